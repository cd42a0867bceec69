"""A packed matrix whose products with few rows are made in C, and the norm and the gate between such products.

Shapes: O outputs, I inputs padded to whole groups, G groups of a scale, M rows of x.
"""

from __future__ import annotations

import ctypes
from ctypes import c_int64, c_void_p
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from layerwise.nets.bits import pack, unpack
from layerwise.nets.compiled import DTYPES, library, matrix_unit
from layerwise.spec import Format

GROUPS = (256, 128, 64, 32)
NIBBLES, BYTES, SIGNED_BYTES = 4, 8, -8
ACTIVATIONS = {"silu": 0, "gelu_tanh": 1}
"""What a gate may do in the compiled functions, and how they are told."""


HALVES = {torch.bfloat16: 16, torch.float16: -16}
"""What dense weights are stored as, and how the compiled functions are told."""


class CMatrix(ctypes.Structure):
    """`Matrix` of `native.h`."""

    _fields_ = [(name, c_void_p) for name in ("codes", "scale", "zero")] + [
        (name, c_int64) for name in ("outputs", "inputs", "group", "kind")]

    @staticmethod
    def of(weight_OI: Tensor) -> CMatrix:
        """A dense matrix in half precision, contiguous; the structure only points to it."""
        return CMatrix(weight_OI.data_ptr(), None, None, *weight_OI.shape, 0, HALVES[weight_OI.dtype])


def multiplied(function: Any, matrix: int, x: Tensor, outputs: int, bias_O: Tensor | None = None) -> Tensor:
    """x w' + bias, [..., O] in the dtype of `x`, by a compiled product of the matrix at that address; bias float32."""
    inputs = x.shape[-1]
    x_MI = x.reshape(-1, inputs).contiguous()
    rows = len(x_MI)
    y_MO = x_MI.new_empty(rows, outputs)
    if function(matrix, x_MI.data_ptr(), rows, None if bias_O is None else bias_O.data_ptr(), y_MO.data_ptr(), outputs,
                DTYPES[x.dtype], torch.get_num_threads()):
        raise MemoryError(f"no memory for {rows} rows of {inputs} inputs")
    return y_MO.view(*x.shape[:-1], outputs)


@dataclass(frozen=True)
class NativeMatrix:
    """Codes as nibbles, uint8 [O, I / 2], or as bytes, [O, I]; scale and (unless symmetric) zero, bfloat16 [O, G].

    Formats of 4 and 8 bits lie as they are stored, so that their tensors are shared; 2 and 3 bits become nibbles,
    5 and 6 bits become bytes.
    """

    store: Tensor
    scale: Tensor
    zero: Tensor | None
    format: Format
    inputs: int
    group: int

    @staticmethod
    def fits(format: Format, inputs: int) -> bool:
        """Whether the library is there and can hold a matrix of this format with `inputs` (padded) inputs."""
        return _group(format, inputs) is not None and library() is not None

    @staticmethod
    def build(stored: Tensor, scale_OG: Tensor, zero_OG: Tensor | None, format: Format, inputs: int) -> NativeMatrix:
        """From the codes as a `PackedMatrix` stores them."""
        if format.bits not in (4, 8):
            wide = _stored_bits(format.bits)
            codes_OI = unpack(stored, format.bits, inputs) + _offset(format.bits)
            stored = pack(codes_OI, wide)
        group = _group(format, inputs)
        assert group is not None
        repeat = inputs // group // scale_OG.shape[1]
        if repeat > 1:
            scale_OG = scale_OG.repeat_interleave(repeat, 1)
            zero_OG = None if zero_OG is None else zero_OG.repeat_interleave(repeat, 1)
        zero_OG = None if zero_OG is None else zero_OG.contiguous()
        return NativeMatrix(stored.contiguous(), scale_OG.contiguous(), zero_OG, format, inputs, group)

    @cached_property
    def _struct(self) -> CMatrix:
        kind = SIGNED_BYTES if self.store.dtype == torch.int8 else _stored_bits(self.format.bits)
        zero = None if self.zero is None else self.zero.data_ptr()
        codes, scale = self.store.data_ptr(), self.scale.data_ptr()
        return CMatrix(codes, scale, zero, len(self.store), self.inputs, self.group, kind)

    def __getstate__(self) -> dict[str, object]:
        """What a copy takes over: addresses are its own."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def address(self) -> int:
        """Where the C structure of the matrix lies, as long as this object lives."""
        return ctypes.addressof(self._struct)

    @property
    def many(self) -> frozenset[torch.dtype]:
        """Of what dtypes the product takes many rows too: bfloat16 is torch's where it has a matrix unit for that."""
        found = library()
        pairs = found is not None and bool(found.multiplies_pairs()) and not matrix_unit()
        return frozenset(DTYPES) if pairs else frozenset({torch.float32})

    @cached_property
    def _call(self) -> tuple[Any, int, int]:
        found = library()
        assert found is not None
        return found.packed_product, self.address, len(self.store)

    def product(self, x_MI: Tensor, bias_O: Tensor | None = None) -> Tensor:
        """x w' + bias, [M, O] in the dtype of `x_MI`, float32 or bfloat16; `x_MI` may lack the padded inputs."""
        inputs = x_MI.shape[1]
        if inputs < self.inputs:
            x_MI = torch.nn.functional.pad(x_MI, (0, self.inputs - inputs))
        multiply, matrix, outputs = self._call
        return multiplied(multiply, matrix, x_MI, outputs, bias_O)

    def codes(self, start: int, stop: int) -> Tensor:
        """The codes of rows `start` to `stop`, uint8 [stop - start, I]."""
        return self._read(self.store[start:stop])

    def gather(self, rows_M: Tensor) -> Tensor:
        """The codes of the given rows, uint8 [M, I]."""
        return self._read(self.store[rows_M])

    def dense_rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """The numbers of rows `start` to `stop`, float32 or bfloat16 [stop - start, I]."""
        found = library()
        assert found is not None
        y_NI = torch.empty(stop - start, self.inputs, dtype=dtype)
        found.packed_numbers(self.address, start, stop, y_NI.data_ptr(), DTYPES[dtype], torch.get_num_threads())
        return y_NI

    def values(self, rows_M: Tensor) -> Tensor:
        """The numbers of the given rows, float32 [M, I]. Raises IndexError for a row that does not exist."""
        found, rows_M = library(), rows_M.to(torch.int64).contiguous()
        assert found is not None
        y_MI = torch.empty(len(rows_M), self.inputs)
        if found.packed_rows(self.address, rows_M.data_ptr(), len(rows_M), y_MI.data_ptr()):
            raise IndexError(f"rows {int(rows_M.min())} to {int(rows_M.max())} of a table of {len(self.store)}")
        return y_MI

    def _read(self, store: Tensor) -> Tensor:
        return unpack(store, _stored_bits(self.format.bits), self.inputs) - _offset(self.format.bits)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension; x float32 or bfloat16, weight float32."""
    found = library()
    assert found is not None
    x = x.contiguous()
    y, width = torch.empty_like(x), x.shape[-1]
    found.rms_norm(x.data_ptr(), weight.data_ptr(), x.numel() // width, width, eps, y.data_ptr(), DTYPES[x.dtype],
                   torch.get_num_threads())
    return y


def gate_times(x: Tensor, activation: str) -> Tensor:
    """activation(gate) * up; gate and up are the halves of the last dimension of x, float32 or bfloat16.

    `activation` is one of `ACTIVATIONS`.
    """
    found = library()
    assert found is not None
    x = x.contiguous()
    width = x.shape[-1] // 2
    y = x.new_empty(*x.shape[:-1], width)
    found.gate_times(x.data_ptr(), y.numel() // width, width, y.data_ptr(), ACTIVATIONS[activation], DTYPES[x.dtype],
                     torch.get_num_threads())
    return y


def _stored_bits(bits: int) -> int:
    return NIBBLES if bits <= NIBBLES else BYTES


def _offset(bits: int) -> int:
    """What moves the middle of a code to that of its nibble or byte."""
    return (1 << _stored_bits(bits) - 1) - (1 << bits - 1)


def _group(format: Format, inputs: int) -> int | None:
    """The largest group of the library that divides the format's; None where there is none."""
    return next((group for group in GROUPS if (format.group or inputs) % group == 0), None)
