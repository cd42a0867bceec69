"""Layers in a looser order, for guesses: in groups whose attention all reads what enters the first of them.

In a group, attention of every layer can run at the same time, on as many devices; feed-forward halves follow one
after the other. Only the first layer of a group sees what it would in order. Source: the fuzzy forward pass of
EasySpec, arXiv 2502.02493; how the halves are added up is our reading.

Shapes: N packed tokens, C hidden width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from torch import Tensor

from layerwise.errors import BadOption
from layerwise.nets.decoder import Block
from layerwise.nets.flow import Flow
from layerwise.stack.decoder import DecoderStack


def groups(depth: int, size: int) -> list[range]:
    """The first and the last layer by themselves, those between in runs of `size`; the last run may be shorter."""
    inner = [range(start, min(start + size, depth - 1)) for start in range(1, depth - 1, size)]
    return [range(1), *inner, *([range(depth - 1, depth)] if depth > 1 else [])]


@dataclass(frozen=True)
class InGroups:
    """An action: attention of `size` layers at once; with `whole` their feed-forward halves as well.

    Raises BadOption for a size below 1.
    """

    size: int = 4
    whole: bool = False

    def __post_init__(self) -> None:
        if self.size < 1:
            raise BadOption(f"groups of {self.size} layers", expected="1 or more", do="use 4, or 1 for layers in order")

    def __call__(self, stack: DecoderStack, x_1NC: Tensor, flow: Flow, layers: range) -> Tensor:
        for group in groups(len(stack), self.size):
            inside = range(max(group.start, layers.start), min(group.stop, layers.stop))
            x_1NC = self._group(stack, x_1NC, flow, inside)
        return x_1NC

    def _group(self, stack: DecoderStack, x_1NC: Tensor, flow: Flow, layers: range) -> Tensor:
        blocks = {layer: cast(Block, stack.block(layer)) for layer in layers}
        attended = {layer: block.attention(x_1NC, flow, layer) for layer, block in blocks.items()
                    if block.attention is not None}
        if self.whole:
            x_1NC = sum(attended.values(), x_1NC)
            return sum([block.feed_forward(x_1NC) for block in blocks.values() if block.feed_forward], x_1NC)
        for layer, block in blocks.items():
            if layer in attended:
                x_1NC = x_1NC + attended[layer]
            if block.feed_forward is not None:
                x_1NC = x_1NC + block.feed_forward(x_1NC)
        return x_1NC


def critical_path(depth: int, size: int) -> int:
    """Halves of layers that a token passes one after the other when every group has as many devices as layers."""
    return len(groups(depth, size)) + depth
