"""A clock that measures: milliseconds to decode one token, row by row, on this machine.

A layer is built from its row with arbitrary weights, since time does not depend on their values. Several
copies run one after the other, so that weights come from memory, as they do in a whole model, and not from
a cache that a single layer would fit into.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import torch
from torch import nn

from layerwise.errors import BadBudget
from layerwise.measure.timing import median_seconds
from layerwise.nets.decoder import Block, Decoder
from layerwise.nets.flow import Flow, LayerCache
from layerwise.spec import Attention, LayerSpec, Opaque, StackSpec

MOST_COPIES = 24

M = TypeVar("M", bound=nn.Module)


class Stopwatch:
    """Times rows of `spec` for one stream, after `past` tokens; the median of `repeats` after a warm-up.

    Every distinct row is measured once. Copies of a layer add up to `cold_bytes`, or are 24. Raises
    BadBudget for a model whose layers layerwise did not build.
    """

    def __init__(self, spec: StackSpec, past: int = 128, repeats: int = 9, cold_bytes: float = 48e6) -> None:
        if spec.outside or any(isinstance(row.mixer, Opaque) for row in spec.rows):
            raise BadBudget("a limit on milliseconds for a module that layerwise did not build",
                            expected="a decoder language model", do="limit bytes, parameters or layers")
        self.spec, self.repeats, self.cold_bytes = spec, repeats, cold_bytes
        self.past = max(1, min(past, spec.context - repeats - 1))
        self.dtype: torch.dtype = getattr(torch, spec.dtype)
        self._known: dict[str, float] = {}

    def row(self, row: LayerSpec) -> float:
        """Milliseconds of one layer."""
        return self._once(repr(row), lambda: self._time_row(row))

    def outside(self, spec: StackSpec) -> float:
        """Milliseconds of embedding, final norm and head, stored as in `spec`."""
        bare = replace(spec, rows=())
        return self._once(repr(bare), lambda: self._time_outside(bare))

    def _once(self, key: str, measure: Callable[[], float]) -> float:
        if key not in self._known:
            self._known[key] = measure()
        return self._known[key]

    def _time_row(self, row: LayerSpec) -> float:
        size = row.bytes(self.spec.hidden, self.spec.dtype)
        copies = int(min(MOST_COPIES, 1 + self.cold_bytes // max(size, 1)))
        blocks = [_filled(lambda: Block(row, self.spec.hidden), self.dtype) for _ in range(copies)]
        caches = {layer: self._cache(row) for layer in range(copies)}
        steps = iter(range(self.past, self.spec.context))

        def run() -> None:
            past = next(steps)
            flow = Flow(torch.tensor([[past]]), caches=caches, past=past, dtype=self.dtype)
            x_11C = torch.ones(1, 1, self.spec.hidden, dtype=self.dtype)
            for layer, block in enumerate(blocks):
                x_11C = block(x_11C, flow, layer)

        with torch.inference_mode():
            return self._median(run) / copies

    def _cache(self, row: LayerSpec) -> LayerCache:
        cache = LayerCache()
        if isinstance(row.mixer, Attention):
            shape = 1, row.mixer.kv_heads, self.past, row.mixer.head_dim
            cache.append(torch.ones(shape, dtype=self.dtype), torch.ones(shape, dtype=self.dtype))
        return cache

    def _time_outside(self, bare: StackSpec) -> float:
        decoder = _filled(lambda: Decoder(bare), self.dtype)
        token_11 = torch.zeros(1, 1, dtype=torch.long)
        flow = Flow(torch.zeros(1, 1, dtype=torch.long), dtype=self.dtype)
        with torch.inference_mode():
            return self._median(lambda: decoder(token_11, flow))

    def _median(self, call: Callable[[], object]) -> float:
        return 1e3 * median_seconds(call, self.repeats)


def _filled(build: Callable[[], M], dtype: torch.dtype) -> M:
    """A module of `dtype` with small constant weights, built without its costly random start."""
    with torch.device("meta"):
        module = build().to(dtype)
    module = module.to_empty(device="cpu").eval()
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.detach().fill_(0.01 if tensor.is_floating_point() else 0)
    return module
