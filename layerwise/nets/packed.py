"""Matrices stored as small integers with scales: linear layers and token tables that run on them.

w = (code - 2**(bits - 1)) * scale + zero, with one scale (and zero, unless symmetric) for a group of inputs.

Shapes: O outputs, I inputs, G groups in a row, S stored bytes in a row, M rows of x.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layerwise.nets.bits import pack, stored_bytes, unpack
from layerwise.nets.compiled import DTYPES
from layerwise.nets.cuda import FEW_ROWS as FEW_ROWS_CUDA
from layerwise.nets.cuda import CudaInt4, int8_runs
from layerwise.nets.dense import linear
from layerwise.nets.int4 import Int4Matrix, digits
from layerwise.nets.native import NativeMatrix
from layerwise.nets.row_scales import steps_of, values_of
from layerwise.spec import Format

FEW_ROWS_INT8 = 24
FEW_ROWS = {1: 48, 2: 32}
"""Up to this many rows of x (by digits of 4 bits) a packed kernel beats dequantising and a dense product, as
measured on two AVX-512 cores for matrices of 576 to 49152 outputs."""

ALIGNMENT = 32
"""Bytes; the int8 kernel loads codes by 16 and x by 32."""

CHUNK = 1 << 20
"""Weights dequantised or packed at a time, so that what is needed meanwhile stays in cache."""


def aligned(tensor: Tensor) -> Tensor:
    """The tensor, copied where torch's int8 kernel would fault on its address (views of mapped files)."""
    return tensor if tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()


class PackedMatrix(nn.Module):
    """A packed [O, I] matrix: buffers `codes`, `scale` [O, G] and, unless symmetric, `zero` [O, G].

    8-bit symmetric whole-row codes are int8 [O, I], which kernels read as they are; all others are a
    stream of bits, uint8 [O, S]. The first product of few rows moves bit-stream codes into the layout
    of the device's kernel (4 bits a weight up to 4 bits, 8 bits above) and lets the stream
    go; `state_dict` writes it again, so memory never holds the codes twice. Scales and zeros of a format with
    `scale_bits` are held as bfloat16, which kernels read; `state_dict` holds their steps, `scale` and `zero` as
    streams of bits, and the rows' numbers, `scale_row` and `zero_row` [O].
    """

    codes: Tensor | None
    scale: Tensor
    zero: Tensor | None

    def __init__(self, out_features: int, in_features: int, format: Format) -> None:
        super().__init__()
        self.out_features, self.in_features, self.format = out_features, in_features, format
        groups = math.ceil(in_features / (format.group or in_features))
        self._padded = groups * format.group or in_features
        self._direct = format.bits == 8 and format.group == 0 and format.symmetric
        self.tiled: NativeMatrix | Int4Matrix | CudaInt4 | None = None
        self._operands: tuple[Tensor, Tensor] | None = None
        width, dtype = stored_bytes(self._padded, format.bits), torch.int8 if self._direct else torch.uint8
        self.register_buffer("codes", torch.zeros(out_features, width, dtype=dtype))
        self.register_buffer("scale", torch.zeros(out_features, groups, dtype=torch.bfloat16))
        zero = None if format.symmetric else torch.zeros(out_features, groups, dtype=torch.bfloat16)
        self.register_buffer("zero", zero)

    @classmethod
    def empty(cls, out_features: int, in_features: int, format: Format) -> Self:
        """A matrix of zeros, to be filled from a checkpoint."""
        return cls(out_features, in_features, format)

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix as numbers, [O, I], computed in float32 (float64 for float64) and rounded once."""
        return self.dense_rows(0, self.out_features, dtype)

    def dense_rows(self, start: int, stop: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Rows `start` to `stop` of `dense`, such as one expert of a stack, [stop - start, I]."""
        if isinstance(self.tiled, NativeMatrix) and dtype in DTYPES:
            return self.tiled.dense_rows(start, stop, dtype)[:, : self.in_features]
        out = torch.empty(stop - start, self.in_features, dtype=dtype, device=self.scale.device)
        step = max(1, CHUNK // self._padded)
        for first in range(start, stop, step):
            rows = slice(first, min(first + step, stop))
            out[first - start : rows.stop - start] = self._values(self._codes(rows), rows, dtype)
        return out

    def product(self, x: Tensor) -> Tensor:
        """x w', [..., I] to [..., O], in x's dtype."""
        x_MI = x.reshape(-1, self.in_features)
        y_MO = self._kernel(x_MI)
        if y_MO is None:
            if x.dtype in DTYPES and not torch.is_grad_enabled() and NativeMatrix.fits(self.format, self._padded):
                self.lay_out()  # from which numbers are made many times as fast as from a stream of bits
            y_MO = linear(x_MI, self.dense(x.dtype))
        return y_MO.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, {self.format}"

    # codes ---------------------------------------------------------------------------------------

    def _set(self, codes_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor | None) -> None:
        self.tiled = self._operands = None
        middle = 2 ** (self.format.bits - 1)
        if self._direct:
            self.codes = (codes_OI - middle).contiguous().view(torch.int8)
        else:
            parts = codes_OI.split(max(1, CHUNK // self._padded))
            missing = self._padded - self.in_features
            self.codes = torch.cat([pack(F.pad(part, (0, missing), value=middle), self.format.bits) for part in parts])
        self.scale = self._storable(scale_OG, signed=False)
        self.zero = None if zero_OG is None else self._storable(zero_OG, signed=True)

    def _storable(self, values_OG: Tensor, signed: bool) -> Tensor:
        """The values, bfloat16, or the nearest that the format can store."""
        bits, values_OG = self.format.scale_bits, values_OG.to(torch.bfloat16)
        return values_OG if bits == 16 else values_of(*steps_of(values_OG, bits, signed), bits, signed)

    def _codes(self, rows: slice | Tensor) -> Tensor:
        """Codes of some rows with their padding, uint8; int8 minus the middle where they are stored so."""
        codes = self.codes
        if codes is None:
            assert self.tiled is not None
            tiled = self.tiled
            return tiled.codes(rows.start, rows.stop) if isinstance(rows, slice) else tiled.gather(rows)
        return codes[rows] if self._direct else unpack(codes[rows], self.format.bits, self._padded)

    def _values(self, codes_MI: Tensor, rows: slice | Tensor, dtype: torch.dtype) -> Tensor:
        """Numbers [M, in_features] for the codes of some rows, in float32 or, where asked, float64."""
        work = torch.float64 if dtype == torch.float64 else torch.float32
        scale_MG = self.scale[rows].to(work)
        w_MGg = codes_MI.to(work).reshape(*scale_MG.shape, self._padded // scale_MG.shape[1])
        if not self._direct:
            w_MGg.sub_(2 ** (self.format.bits - 1))
        w_MGg.mul_(scale_MG[..., None])
        if self.zero is not None:
            w_MGg.add_(self.zero[rows].to(work)[..., None])
        return w_MGg.view(len(w_MGg), self._padded)[:, : self.in_features]

    # kernels -------------------------------------------------------------------------------------

    def _kernel(self, x_MI: Tensor) -> Tensor | None:
        """The product through a packed kernel; None where the dense product is needed or faster."""
        rows = len(x_MI)
        if x_MI.dtype != torch.bfloat16 or rows == 0 or (torch.is_grad_enabled() and x_MI.requires_grad):
            return None
        if x_MI.device.type != "cpu":
            return self._cuda_kernel(x_MI) if rows <= FEW_ROWS_CUDA else None
        if rows > FEW_ROWS[digits(self.format.bits)]:
            return None
        matrix = self.lay_out()
        if matrix is not None:
            return matrix.product(x_MI)
        if self._direct and self.in_features % 16 == 0 and rows <= FEW_ROWS_INT8:  # other rows lie unaligned
            codes, scale_O = self._operands or self._prepared()
            return torch._weight_int8pack_mm(aligned(x_MI.contiguous()), codes, scale_O)
        return None

    def _cuda_kernel(self, x_MI: Tensor) -> Tensor | None:
        """The product on a GPU whose kernels are known to be right; None on others."""
        if self._direct:
            assert self.codes is not None
            if not int8_runs(x_MI.device):
                return None
            return torch._weight_int8pack_mm(x_MI.contiguous(), self.codes, self.scale[:, 0].contiguous())
        if self.codes is not None and CudaInt4.fits(self.format, self._padded, x_MI.device):
            codes_OI = unpack(self.codes, self.format.bits, self._padded)
            self.tiled, self.codes = CudaInt4.build(codes_OI, self.scale, self.zero, self.format), None
        return None if self.tiled is None else self.tiled.product(x_MI)

    def _prepared(self) -> tuple[Tensor, Tensor]:
        """What torch's int8 kernel reads, kept because looking buffers up takes longer than a small product."""
        assert self.codes is not None
        self.codes = aligned(self.codes)
        self._operands = self.codes, self.scale[:, 0].contiguous()
        return self._operands

    def lay_out(self) -> NativeMatrix | Int4Matrix | CudaInt4 | None:
        """The matrix in its CPU kernel's layout, made on first use; None where no kernel can hold it."""
        codes = self.codes
        if codes is None or self.tiled is not None or codes.device.type != "cpu":
            return self.tiled
        if NativeMatrix.fits(self.format, self._padded):
            self.tiled = NativeMatrix.build(codes, self.scale, self.zero, self.format, self._padded)
            self.codes = codes if self.tiled.store is codes else None
        elif not self._direct and Int4Matrix.fits(self.format, self._padded):
            codes_OI = unpack(codes, self.format.bits, self._padded)
            self.tiled, self.codes = Int4Matrix.build(codes_OI, self.scale, self.zero, self.format), None
        return self.tiled

    def _stream(self) -> Tensor:
        """The stored form of the codes, wherever they are now."""
        if self.codes is not None:
            return self.codes
        return pack(self._codes(slice(0, self.out_features)), self.format.bits)

    def _untile(self) -> None:
        self.codes, self.tiled, self._operands = self._stream(), None, None

    # torch's own verbs ---------------------------------------------------------------------------

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}codes"] = self._stream()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        bits = self.format.scale_bits
        for name, values_OG in (("scale", self.scale), ("zero", self.zero)):
            if bits != 16 and values_OG is not None:
                steps_OG, row_O = steps_of(values_OG, bits, signed=name == "zero")
                destination[f"{prefix}{name}"], destination[f"{prefix}{name}_row"] = pack(steps_OG, bits), row_O

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self._untile()
        bits, groups = self.format.scale_bits, self.scale.shape[1]
        if bits != 16:
            state_dict = dict(state_dict)
            for name in ("scale", "zero"):
                row_O = state_dict.pop(f"{prefix}{name}_row", None)
                if row_O is not None and f"{prefix}{name}" in state_dict:
                    steps_OG = unpack(state_dict[f"{prefix}{name}"], bits, groups)
                    state_dict[f"{prefix}{name}"] = values_of(steps_OG, row_O, bits, signed=name == "zero")
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves between devices; scales stay bfloat16 whatever the dtype asked for."""
        self._untile()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.scale = self.scale.to(torch.bfloat16)
        self.zero = None if self.zero is None else self.zero.to(torch.bfloat16)
        return self


class PackedLinear(PackedMatrix):
    """A linear layer on a packed matrix: y = x w' + bias, in x's dtype."""

    bias: nn.Parameter | None

    def __init__(self, out_features: int, in_features: int, format: Format, bias: bool = False) -> None:
        super().__init__(out_features, in_features, format)
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    @classmethod
    def empty(cls, out_features: int, in_features: int, format: Format, bias: bool = False) -> Self:
        """A layer of zeros, to be filled from a checkpoint."""
        return cls(out_features, in_features, format, bias)

    @classmethod
    def from_codes(cls, codes_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor | None, format: Format,
                   bias: Tensor | None = None) -> Self:
        """A layer holding codes below 2**bits (uint8), their scales and, unless symmetric, zeros."""
        outputs, inputs = codes_OI.shape
        layer = cls(outputs, inputs, format, bias is not None)
        layer._set(codes_OI, scale_OG, zero_OG)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
        return layer

    @classmethod
    def stacked(cls, layers: Sequence[PackedLinear], bias: Tensor | None = None) -> Self:
        """One layer whose outputs are those of layers of one format, one after the other."""
        codes_OI = torch.cat([layer.unsigned_codes()[:, : layer.in_features] for layer in layers])
        zeros = [layer.zero for layer in layers if layer.zero is not None]
        return cls.from_codes(codes_OI, torch.cat([layer.scale for layer in layers]),
                              torch.cat(zeros) if zeros else None, layers[0].format, bias)

    def unsigned_codes(self) -> Tensor:
        """All codes with their padding, uint8 [O, I]."""
        codes = self._codes(slice(0, self.out_features))
        return codes.view(torch.uint8) + 2 ** (self.format.bits - 1) if self._direct else codes

    def forward(self, x: Tensor) -> Tensor:
        y = self.product(x)
        return y if self.bias is None else y + self.bias


class PackedEmbedding(PackedMatrix):
    """A packed token table, [vocabulary, width]; a tied head reads the same storage with `logits`."""

    def __init__(self, vocabulary: int, width: int, format: Format,
                 dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__(vocabulary, width, format)
        self.dtype = dtype

    @classmethod
    def empty(cls, vocabulary: int, width: int, format: Format,
              dtype: torch.dtype = torch.bfloat16) -> Self:
        """A table of zeros, to be filled from a checkpoint; embeddings come out in `dtype`."""
        return cls(vocabulary, width, format, dtype)

    @classmethod
    def from_codes(cls, codes_VI: Tensor, scale_VG: Tensor, zero_VG: Tensor | None, format: Format,
                   dtype: torch.dtype = torch.bfloat16) -> Self:
        """A table holding codes below 2**bits (uint8), their scales and, unless symmetric, zeros."""
        vocabulary, width = codes_VI.shape
        table = cls(vocabulary, width, format, dtype)
        table._set(codes_VI, scale_VG, zero_VG)
        return table

    def forward(self, tokens: Tensor) -> Tensor:
        """Embeddings of `tokens` (any shape), [..., width] in `dtype`; only their rows are dequantised."""
        rows_M = tokens.reshape(-1)
        if isinstance(self.tiled, NativeMatrix) and self.dtype != torch.float64:
            values_MI = self.tiled.values(rows_M)[:, : self.in_features].to(self.dtype)
        else:
            values_MI = self._values(self._codes(rows_M), rows_M, self.dtype).to(self.dtype)
        return values_MI.view(*tokens.shape, self.in_features)

    def logits(self, x: Tensor) -> Tensor:
        """The table as an output head: x w', [..., vocabulary]."""
        return self.product(x)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return super()._apply(fn, recurse)
