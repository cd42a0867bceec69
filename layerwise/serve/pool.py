"""Keys and values of one layer, in blocks of slots: as they are, or as codes of 8 or 4 bits.

Head by head, so that the slots of a head lie together: consecutive blocks need no copy, gathered ones lie as a matrix
product wants them.

Shapes: N tokens, R rows, M blocks of a row, S slots, K key heads, D head width.
"""

from __future__ import annotations

import math
import mmap
from typing import ClassVar

import torch
from torch import Tensor

from layerwise.nets.attend import Attended, attends
from layerwise.nets.key_codes import KEY_CODES, KeyCode
from layerwise.spec import Attention, Precision

Pair = tuple[Tensor, Tensor]


class Pool:
    """`blocks` blocks of `block` slots, kept in the dtype of the model; what comes and goes is `dtype`."""

    precision: ClassVar[Precision] = "model"

    def __init__(self, blocks: int, block: int, heads: int, width: int, dtype: torch.dtype, device: torch.device,
                 kept: torch.dtype | None = None) -> None:
        self.block, self.dtype = block, dtype
        self.k, self.v = (zeros((heads, blocks * block, width), kept or dtype, device) for _ in range(2))
        self._attended: tuple[Attention, Attended | None] | None = None

    def attended(self, a: Attention) -> Attended | None:
        """The pool as the compiled attention sees it, made once; None where that cannot do `a`."""
        if self._attended is None or self._attended[0] is not a:
            keys, values = self._parts()
            known = attends(a, keys[0].dtype if self.precision == "model" else self.dtype, keys[0].device)
            self._attended = a, Attended(a, keys, values, self.block, self.precision) if known else None
        return self._attended[1]

    def write(self, slots_N: Tensor, k_KND: Tensor, v_KND: Tensor) -> Pair | None:
        """Put tokens into slots; gives them as they will be read, unless reading them is the way to know."""
        k_KND, v_KND = k_KND.to(self.k.dtype), v_KND.to(self.v.dtype)
        self.k.index_copy_(1, slots_N, k_KND)
        self.v.index_copy_(1, slots_N, v_KND)
        return k_KND.to(self.dtype), v_KND.to(self.dtype)

    def gather(self, blocks_RM: Tensor) -> Pair:
        """All slots of the given blocks, row by row, [R, K, S, D]."""
        return self._rows(self.k, blocks_RM).to(self.dtype), self._rows(self.v, blocks_RM).to(self.dtype)

    def span(self, start: int, stop: int) -> Pair:
        """Consecutive slots, [1, K, S, D]."""
        k, v = (store.narrow(1, start, stop - start)[None].to(self.dtype) for store in (self.k, self.v))
        return k, v

    def move(self, source_N: Tensor, target_N: Tensor) -> None:
        """Copy slots to other slots."""
        for store in self._stores():
            store[:, target_N] = store[:, source_N]

    def _parts(self) -> tuple[list[Tensor], list[Tensor]]:
        """The tensors of keys and those of values."""
        return [self.k], [self.v]

    def _stores(self) -> list[Tensor]:
        keys, values = self._parts()
        return keys + values

    def _rows(self, store: Tensor, blocks_RM: Tensor) -> Tensor:
        heads, _, width = store.shape
        rows, count = blocks_RM.shape
        found = store.view(heads, -1, self.block * width).index_select(1, blocks_RM.flatten())
        return found.view(heads, rows, count * self.block, width).transpose(0, 1)


class CodedPool(Pool):
    """Keys and values as codes: every store is several tensors."""

    @property
    def code(self) -> KeyCode:
        """What its codes stand for."""
        return KEY_CODES[self.precision]

    def __init__(self, blocks: int, block: int, heads: int, width: int, dtype: torch.dtype, device: torch.device,
                 kept: torch.dtype | None = None) -> None:
        self.block, self.dtype = block, dtype
        self.keys, self.values = ([zeros((heads, blocks * block, size), kind, device) for size, kind in
                                   self.code.layout(width)] for _ in range(2))
        self._attended = None

    def write(self, slots_N: Tensor, k_KND: Tensor, v_KND: Tensor) -> Pair | None:
        for stores, new in ((self.keys, k_KND), (self.values, v_KND)):
            for store, part in zip(stores, self.code.encode(new.float()), strict=True):
                store.index_copy_(1, slots_N, part)
        return None

    def gather(self, blocks_RM: Tensor) -> Pair:
        k, v = (self.code.decode([self._rows(store, blocks_RM) for store in stores]).to(self.dtype)
                for stores in (self.keys, self.values))
        return k, v

    def span(self, start: int, stop: int) -> Pair:
        k, v = (self.code.decode([store[None, :, start:stop] for store in stores]).to(self.dtype)
                for stores in (self.keys, self.values))
        return k, v

    def _parts(self) -> tuple[list[Tensor], list[Tensor]]:
        return self.keys, self.values


class Int8Pool(CodedPool):
    """In 8 bits."""

    precision = "int8"


class Int4Pool(CodedPool):
    """In 4 bits."""

    precision = "int4"


POOLS: dict[Precision, type[Pool]] = {"model": Pool, "int8": Int8Pool, "int4": Int4Pool}


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros that, on a CPU, take memory only where they are written."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    size = math.prod(shape) * dtype.itemsize
    memory = mmap.mmap(-1, max(1, size), access=mmap.ACCESS_COPY)  # numpy's zeros come in pages of 2 MB, one a head
    return torch.frombuffer(memory, dtype=torch.uint8, count=size).view(dtype).view(shape)
