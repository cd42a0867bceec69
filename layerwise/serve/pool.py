"""Keys and values of one layer, in blocks of slots: as they are, or as 8-bit integers with scales.

Head by head, so that the slots of a head lie together: consecutive blocks need no copy, gathered ones lie as a matrix
product wants them.

Shapes: N tokens, R rows, M blocks of a row, S slots, K key heads, D head width.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]


class Pool:
    """`blocks` blocks of `block` slots in the dtype of the model."""

    exact = True

    def __init__(self, blocks: int, block: int, heads: int, width: int, dtype: torch.dtype,
                 device: torch.device) -> None:
        self.block = block
        self.k, self.v = (_zeros((heads, blocks * block, width), dtype, device) for _ in range(2))

    def write(self, slots_N: Tensor, k_KND: Tensor, v_KND: Tensor) -> None:
        """Put tokens into slots."""
        self.k.index_copy_(1, slots_N, k_KND)
        self.v.index_copy_(1, slots_N, v_KND)

    def gather(self, blocks_RM: Tensor) -> Pair:
        """All slots of the given blocks, row by row, [R, K, S, D]."""
        return self._rows(self.k, blocks_RM), self._rows(self.v, blocks_RM)

    def span(self, start: int, stop: int) -> Pair:
        """Consecutive slots, [1, K, S, D]."""
        return self.k.narrow(1, start, stop - start)[None], self.v.narrow(1, start, stop - start)[None]

    def move(self, source_N: Tensor, target_N: Tensor) -> None:
        """Copy slots to other slots."""
        for store in self._stores():
            store[:, target_N] = store[:, source_N]

    def _stores(self) -> tuple[Tensor, ...]:
        return self.k, self.v

    def _rows(self, store: Tensor, blocks_RM: Tensor) -> Tensor:
        heads, _, width = store.shape
        rows, count = blocks_RM.shape
        found = store.view(heads, -1, self.block * width).index_select(1, blocks_RM.flatten())
        return found.view(heads, rows, count * self.block, width).transpose(0, 1)


class Int8Pool(Pool):
    """8-bit integers, rounded to nearest, with a float32 scale for each head of a token."""

    exact = False

    def __init__(self, blocks: int, block: int, heads: int, width: int, dtype: torch.dtype,
                 device: torch.device) -> None:
        super().__init__(blocks, block, heads, width, torch.int8, device)
        self.dtype = dtype
        shape = heads, blocks * block, 1
        self.k_scale, self.v_scale = (_zeros(shape, torch.float32, device) for _ in range(2))

    def write(self, slots_N: Tensor, k_KND: Tensor, v_KND: Tensor) -> None:
        for store, scales, new in ((self.k, self.k_scale, k_KND), (self.v, self.v_scale, v_KND)):
            scale_KN1 = new.float().abs().amax(-1, keepdim=True).clamp(min=1e-12) / 127
            store.index_copy_(1, slots_N, (new / scale_KN1).round().to(torch.int8))
            scales.index_copy_(1, slots_N, scale_KN1)

    def gather(self, blocks_RM: Tensor) -> Pair:
        k = self._rows(self.k, blocks_RM) * self._rows(self.k_scale, blocks_RM)
        v = self._rows(self.v, blocks_RM) * self._rows(self.v_scale, blocks_RM)
        return k.to(self.dtype), v.to(self.dtype)

    def span(self, start: int, stop: int) -> Pair:
        k = self.k[None, :, start:stop] * self.k_scale[None, :, start:stop]
        v = self.v[None, :, start:stop] * self.v_scale[None, :, start:stop]
        return k.to(self.dtype), v.to(self.dtype)

    def _stores(self) -> tuple[Tensor, ...]:
        return self.k, self.v, self.k_scale, self.v_scale


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros that, on a CPU, take memory only where they are written."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)).view(dtype).view(shape)
