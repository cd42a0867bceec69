"""Layers whose weights wait elsewhere and are brought ahead: an action (`plan.py`) for a model larger than its device.

While a layer runs, a thread brings the next one that waits: from disk, or from the host's memory to a GPU. So at most
two of those layers are on the device, and where bringing one takes no longer than running those before it, waiting
costs no time.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor, nn

from layerwise.errors import BadOption
from layerwise.nets.decoder import Block
from layerwise.nets.flow import Flow
from layerwise.nets.prepared import prepare
from layerwise.serve.table import Place
from layerwise.stack.decoder import DecoderStack


class Staged:
    """Runs the layers of `stack`, opened with `stream=True`, in order; `places` says where each waits.

    Layers that are not named stay on the device. Raises BadOption for a stack that is held whole, or for
    "host" without a GPU, where host and device are one.
    """

    def __init__(self, stack: DecoderStack, places: Mapping[int, Place]) -> None:
        _check(stack, places)
        self.stack = stack
        self.waiting = sorted(layer for layer, place in places.items() if place != "device")
        self._host = {layer: _pinned(stack.read(layer, torch.device("cpu")))
                      for layer in self.waiting if places[layer] == "host"}
        self._kept: dict[int, nn.Module] = {
            layer: prepare(stack.read(layer)) for layer in range(len(stack)) if layer not in self.waiting}
        self._bringer = ThreadPoolExecutor(1, "layerwise-layers")
        self._copies = torch.cuda.Stream(stack.device) if stack.device.type == "cuda" else None
        self._coming: tuple[int, Future[Block]] | None = None
        self._here: tuple[int, Block] | None = None

    def __call__(self, stack: DecoderStack, x_1NC: Tensor, flow: Flow, layers: range) -> Tensor:
        for layer in layers:
            x_1NC = (self._kept.get(layer) or self._take(layer))(x_1NC, flow, layer)
        return x_1NC

    def _take(self, layer: int) -> Block:
        """A layer that waits; the next one is sent for."""
        if self._here is None or self._here[0] != layer:
            coming, self._here, self._coming = self._coming, None, None
            if coming is None or coming[0] != layer:
                coming = self._send_for(layer)
            self._here = layer, coming[1].result()
            if self._copies is not None:
                _hand_over(self._here[1], self.stack.device)
        if self._coming is None and len(self.waiting) > 1:
            following = next((other for other in self.waiting if other > layer), self.waiting[0])
            self._coming = self._send_for(following)
        return self._here[1]

    def _send_for(self, layer: int) -> tuple[int, Future[Block]]:
        return layer, self._bringer.submit(self._bring, layer)

    @torch.inference_mode()
    def _bring(self, layer: int) -> Block:
        if self._copies is None:
            return _moved(self.stack.read(layer), torch.Tensor.clone)
        source = self._host.get(layer) or _pinned(self.stack.read(layer, torch.device("cpu")))
        with torch.cuda.stream(self._copies):
            moved = _moved(source, lambda tensor: tensor.to(self.stack.device, non_blocking=True))
        self._copies.synchronize()
        return moved


def _check(stack: DecoderStack, places: Mapping[int, Place]) -> None:
    if not stack.streamed:
        raise BadOption(f"layers of {stack.name} elsewhere, which is in memory", expected="a stack that reads layers",
                        do="open it with stream=True")
    for layer, place in places.items():
        if place == "host" and stack.device.type == "cpu":
            raise BadOption(f"layer {layer} on the host, which is the device", expected='"device" or "disk"',
                            do="leave it on the device")


def _moved(block: Block, move: Callable[[Tensor], Tensor]) -> Block:
    """A copy of the block whose tensors are what `move` makes of them."""
    parameters = {id(each): nn.Parameter(move(each.detach()), requires_grad=False) for each in block.parameters()}
    return copy.deepcopy(block, {**parameters, **{id(each): move(each) for each in block.buffers()}})


def _pinned(block: Block) -> Block:
    """The block in memory from which a GPU copies by itself."""
    return _moved(block, torch.Tensor.pin_memory)


def _hand_over(block: Block, device: torch.device) -> None:
    """Let the allocator know that the computing stream uses what another stream's copies made."""
    for tensor in (*block.parameters(), *block.buffers()):
        tensor.record_stream(torch.cuda.current_stream(device))
