"""Keys and values of one layer, in blocks: as they are, or as 8-bit integers with a scale for each head of a token.

Shapes: N tokens, R rows, M blocks of a row, S slots, K key heads, D head width.
"""

from __future__ import annotations

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]


class Pool:
    """`blocks` blocks of `block` slots in the dtype of the model."""

    exact = True

    def __init__(self, blocks: int, block: int, heads: int, width: int, dtype: torch.dtype,
                 device: torch.device) -> None:
        self.block, self.shape = block, (heads, width)
        self.k, self.v = (torch.zeros(blocks, block, heads, width, dtype=dtype, device=device) for _ in range(2))
        self._slots = self.k.view(-1, heads, width), self.v.view(-1, heads, width)

    def write(self, slots_N: Tensor, k_NKD: Tensor, v_NKD: Tensor) -> None:
        """Put tokens into slots."""
        for store, new in zip(self._slots, (k_NKD, v_NKD), strict=True):
            store.index_copy_(0, slots_N, new)

    def gather(self, blocks_RM: Tensor) -> Pair:
        """All slots of the given blocks, row by row, [R, K, S, D]."""
        return self._rows(self.k, blocks_RM), self._rows(self.v, blocks_RM)

    def span(self, start: int, stop: int) -> Pair:
        """Consecutive slots, [1, K, S, D]."""
        k, v = (store[start:stop].transpose(0, 1)[None] for store in self._slots)
        return k, v

    def move(self, source_N: Tensor, target_N: Tensor) -> None:
        """Copy slots to other slots."""
        for store in self._slots:
            store[target_N] = store[source_N]

    @staticmethod
    def _rows(store: Tensor, blocks_RM: Tensor) -> Tensor:
        rows, count = blocks_RM.shape
        found = store.index_select(0, blocks_RM.flatten())
        return found.view(rows, count * store.shape[1], *store.shape[2:]).transpose(1, 2)


class Int8Pool(Pool):
    """8-bit integers, rounded to nearest, with a float32 scale for each head of a token."""

    exact = False

    def __init__(self, blocks: int, block: int, heads: int, width: int, dtype: torch.dtype,
                 device: torch.device) -> None:
        super().__init__(blocks, block, heads, width, torch.int8, device)
        self.dtype = dtype
        self.k_scale, self.v_scale = (torch.zeros(blocks, block, heads, 1, device=device) for _ in range(2))
        self._scales = self.k_scale.view(-1, heads, 1), self.v_scale.view(-1, heads, 1)

    def write(self, slots_N: Tensor, k_NKD: Tensor, v_NKD: Tensor) -> None:
        for store, scales, new in zip(self._slots, self._scales, (k_NKD, v_NKD), strict=True):
            scale_NK1 = new.float().abs().amax(-1, keepdim=True).clamp(min=1e-12) / 127
            store.index_copy_(0, slots_N, (new / scale_NK1).round().to(torch.int8))
            scales.index_copy_(0, slots_N, scale_NK1)

    def gather(self, blocks_RM: Tensor) -> Pair:
        k, v = (self._rows(store, blocks_RM) * self._rows(scale, blocks_RM)
                for store, scale in ((self.k, self.k_scale), (self.v, self.v_scale)))
        return k.to(self.dtype), v.to(self.dtype)

    def span(self, start: int, stop: int) -> Pair:
        k, v = ((store[start:stop] * scale[start:stop]).to(self.dtype).transpose(0, 1)[None]
                for store, scale in zip(self._slots, self._scales, strict=True))
        return k, v

    def move(self, source_N: Tensor, target_N: Tensor) -> None:
        for store in (*self._slots, *self._scales):
            store[target_N] = store[source_N]
