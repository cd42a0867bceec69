"""Attention straight from blocks of slots, in one call: norms and rotation, writing to the pools, softmax.

In bfloat16 by a matrix unit (`unit_attend.c`) or pair by pair (`attend.c`) where the processor and the heads allow it,
else in float32 (`attend.c` as well), from keys and values as numbers or as codes.

Shapes: N tokens, R sequences, M blocks of the longest, H query heads, K key heads, S slots of a pool, D head width.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_float, c_int64, c_void_p

import torch
from torch import Tensor

from layerwise.nets.compiled import DTYPES, library
from layerwise.spec import Attention, Precision

WIDEST = 512
CODED: dict[Precision, int] = {"int8": 2, "int4": 3}
"""How the compiled function is told of codes; numbers are told of as `DTYPES` says."""


class _Places(ctypes.Structure):
    _fields_ = [(name, c_void_p) for name in ("slot", "row", "place", "order", "first", "table")] + [
        ("columns", c_int64)]


class Places:
    """Where new tokens are in the pools of one group of layers: everything int64, on the CPU.

    `slot_N` is where a token's key goes, `row_N` its sequence, `place_N` its place among the slots of that, `first_R`
    the number of the first block of `table_RM` in its sequence. `order_N` names all tokens, those of one sequence one
    behind the other, sequences that begin with the same blocks side by side: such blocks may be read for all of them.
    """

    def __init__(self, slot_N: Tensor, row_N: Tensor, place_N: Tensor, order_N: Tensor, first_R: Tensor,
                 table_RM: Tensor) -> None:
        self._tensors = slot_N, row_N, place_N, order_N, first_R, table_RM  # the structure only points to them
        self._struct = _Places(*(tensor.data_ptr() for tensor in self._tensors), table_RM.shape[1])
        self.address = ctypes.addressof(self._struct)


class _Shape(ctypes.Structure):
    _fields_ = [(name, c_int64) for name in ("heads", "kv_heads", "width", "turning", "slots", "block", "window")] + [
        (name, c_float) for name in ("scale", "softcap")]


class _HeadNorms(ctypes.Structure):
    _fields_ = [("q", c_void_p), ("k", c_void_p), ("eps", c_float)]


class HeadNorms:
    """Norms of every head of queries and of keys: what they multiply with, float32 [D], and epsilon."""

    def __init__(self, q_D: Tensor, k_D: Tensor, eps: float) -> None:
        self._kept = q_D, k_D
        self._struct = _HeadNorms(q_D.data_ptr(), k_D.data_ptr(), eps)
        self.address = ctypes.addressof(self._struct)


class _Codes(ctypes.Structure):
    _fields_ = [(name, c_void_p) for name in ("codes", "scale", "step")]


class Attended:
    """The pools of one layer in blocks of `block` slots, and how new tokens attend to them.

    `keys` and `values` are one tensor each, [K, S, D], or the parts of codes of that `precision` (see `KeyCode`).
    Beside tokens in float32 numbers may be bfloat16.
    """

    def __init__(self, a: Attention, keys: Sequence[Tensor], values: Sequence[Tensor], block: int,
                 precision: Precision = "model") -> None:
        turning = 0 if a.rope is None else int(a.head_dim * a.rope.part)
        self._struct = _Shape(a.heads, a.kv_heads, a.head_dim, turning, keys[0].shape[1], block, a.window or 0,
                              a.head_dim**-0.5 if a.scale is None else a.scale, a.softcap or 0.0)
        self.address = ctypes.addressof(self._struct)
        codes = [_Codes(*(part.data_ptr() for part in parts)) for parts in (keys, values)]
        self._kept = keys, values, codes
        plain = precision == "model"
        self.k, self.v = (parts[0].data_ptr() if plain else ctypes.addressof(coded)
                          for parts, coded in zip((keys, values), codes, strict=True))
        self.kept = DTYPES[keys[0].dtype] if plain else CODED[precision]
        self.out = a.heads * a.head_dim


class Pages:
    """What the new tokens of one layer attend to.

    `rotation` holds cosines and signed sines as `Flow.rotation` gives them.
    """

    __slots__ = ("_kept", "cos", "k", "kept", "out", "places", "shape", "sin", "v")

    def __init__(self, attended: Attended, places: Places, rotation: tuple[Tensor, Tensor] | None) -> None:
        self._kept = attended, places, rotation
        self.shape, self.k, self.v, self.kept = attended.address, attended.k, attended.v, attended.kept
        self.out = attended.out
        self.places = places.address
        self.cos: int | None = None if rotation is None else rotation[0].data_ptr()
        self.sin: int | None = None if rotation is None else rotation[1].data_ptr()


def attends(a: Attention, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `attend` can do this attention, with keys that come and go as `dtype`."""
    return (device.type == "cpu" and dtype in DTYPES and a.head_dim % 8 == 0 and a.head_dim <= WIDEST
            and library() is not None)


def attend(qkv_NA: Tensor, pages: Pages, norms: HeadNorms | None = None) -> Tensor:
    """What tokens get from all slots they see, [N, H D], after their own keys and values went to the pools.

    `qkv_NA` holds heads of queries, keys and values that are not normed and rotated yet.
    """
    found = library()
    assert found is not None
    tokens, qkv_NA = len(qkv_NA), qkv_NA.contiguous()
    out_ND = qkv_NA.new_empty(tokens, pages.out)
    if found.attend(pages.shape, pages.places, None if norms is None else norms.address, tokens, qkv_NA.data_ptr(),
                    pages.cos, pages.sin, pages.k, pages.v, out_ND.data_ptr(), DTYPES[qkv_NA.dtype], pages.kept,
                    torch.get_num_threads()):
        raise MemoryError(f"no memory for the attention of {tokens} tokens")
    return out_ND
