"""Packed matrices as GGML blocks: which block type holds a format, and its bytes without rounding a code again.

A block covers 32 inputs. Q4_0, Q5_0 and Q8_0 are symmetric, w = (q - middle) d; Q4_1 and Q5_1 add the least
value, w = q d + m. Scales there are float16 and here bfloat16: a bfloat16 has fewer digits, so d is exact
from 6e-5 up and off by at most 3e-8 below, and m = zero - 2**(bits - 1) scale is rounded once. Layouts:
https://github.com/ggml-org/llama.cpp/blob/master/ggml/src/ggml-common.h

Shapes: O outputs, I inputs, N blocks in a row, G groups in a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from layerwise.errors import BadOption
from layerwise.export.base import Allowed, refuse
from layerwise.nets.bits import unpack
from layerwise.nets.packed import PackedMatrix
from layerwise.spec import Format

BLOCK = 32
CHUNK = 1 << 22
"""Weights encoded at a time."""

NATURAL = {(True, 4): "Q4_0", (True, 5): "Q5_0", (True, 8): "Q8_0", (False, 4): "Q4_1", (False, 5): "Q5_1"}
WIDER = {(True, 2): "Q4_0", (True, 3): "Q4_0", (True, 6): "Q8_0", (False, 2): "Q4_1", (False, 3): "Q4_1"}
"""(symmetric, bits) to the type that holds the same codes."""


@dataclass(frozen=True)
class Codes:
    """Codes uint8 [O, I], scale and zero float32 [O, N] by block; zero is None where symmetric."""

    codes_OI: Tensor
    scale_ON: Tensor
    zero_ON: Tensor | None
    bits: int

    def rows(self, order: Tensor) -> Codes:
        """The same matrix with its rows in another order."""
        zero = None if self.zero_ON is None else self.zero_ON[order]
        return Codes(self.codes_OI[order], self.scale_ON[order], zero, self.bits)


def block_type(format: Format, columns: int, what: str, allowed: Allowed) -> tuple[str, bool]:
    """The GGML type for a matrix of rows of `columns`, and whether its codes are kept; "" means dense.

    Raises BadOption naming the matrix `what` and what to allow.
    """
    key = (format.symmetric, format.bits)
    fits = columns % BLOCK == 0 and format.group % BLOCK == 0
    if fits and key in NATURAL:
        return NATURAL[key], True
    if fits and key in WIDER and allowed.wider:
        return WIDER[key], True
    if columns % BLOCK == 0 and allowed.requantize:
        return rounded_type(format.bits), False
    if allowed.dense:
        return "", False
    raise _no_type(format, columns, what, WIDER.get(key) if fits else None)


def codes(matrix: PackedMatrix) -> Codes:
    """The codes of a matrix whose groups are whole blocks."""
    format, columns = matrix.format, matrix.in_features
    stored = matrix.state_dict()["codes"]
    middle = 2 ** (format.bits - 1)
    padded = matrix.scale.shape[1] * format.group or columns
    codes_OI = stored.to(torch.int16).add(middle).to(torch.uint8) if stored.dtype == torch.int8 else \
        unpack(stored, format.bits, padded)[:, :columns]
    blocks = columns // BLOCK
    repeat = (format.group or columns) // BLOCK

    def by_block(value_OG: Tensor) -> Tensor:
        return value_OG.float().repeat_interleave(repeat, 1)[:, :blocks]

    return Codes(codes_OI, by_block(matrix.scale), None if matrix.zero is None else by_block(matrix.zero), format.bits)


def encode(matrix: Codes, kind: str, what: str) -> np.ndarray[Any, Any]:
    """The bytes of a matrix as GGML blocks of type `kind`, uint8 [O, bytes of a row].

    Raises BadOption, naming the matrix `what`, where a scale leaves float16's range.
    """
    rows = max(1, CHUNK // matrix.codes_OI.shape[1])
    parts = [_encode(matrix.rows(order), kind, what) for order in torch.arange(len(matrix.codes_OI)).split(rows)]
    return torch.cat(parts).numpy()


def _encode(matrix: Codes, kind: str, what: str) -> Tensor:
    middle = 2 ** (matrix.bits - 1)
    q_ONb = matrix.codes_OI.unflatten(1, (-1, BLOCK))
    heads = [_half(matrix.scale_ON, what)]
    if kind.endswith("_1"):
        zero_ON = torch.zeros_like(matrix.scale_ON) if matrix.zero_ON is None else matrix.zero_ON
        heads.append(_half(zero_ON - middle * matrix.scale_ON, what))
    elif kind != "Q8_0":
        q_ONb = q_ONb + (8 if kind == "Q4_0" else 16) - middle
    if kind == "Q8_0":
        body = [(q_ONb.to(torch.int16) - middle).to(torch.int8).view(torch.uint8)]
    else:
        body = [*_fifth_bits(q_ONb, kind), _nibbles(q_ONb)]
    return torch.cat([*heads, *body], -1).flatten(1)


def _nibbles(q_ONb: Tensor) -> Tensor:
    """Low four bits: the first 16 weights of a block in the low halves of its bytes, the others above."""
    low, high = (q_ONb & 15).chunk(2, -1)
    return low | (high << 4)


def _fifth_bits(q_ONb: Tensor, kind: str) -> list[Tensor]:
    """The fifth bit of every weight, weight i in bit i of four bytes."""
    if not kind.startswith("Q5"):
        return []
    bits = (q_ONb >> 4).unflatten(-1, (4, 8))
    return [(bits << torch.arange(8, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)]


def _half(value_ON: Tensor, what: str) -> Tensor:
    """Float16 values as two bytes each, [O, N, 2]."""
    half = value_ON.half()
    if not bool(half.isfinite().all()):
        raise refuse(f"a scale or offset of {float(value_ON.abs().max()):.3g} in {what}", "GGUF's float16",
                     "at most 65504", "allow --allow-dense")
    return half[..., None].view(torch.uint8)


def rounded_type(bits: int) -> str:
    return "Q4_1" if bits <= 4 else "Q5_1" if bits == 5 else "Q8_0"


def _no_type(format: Format, columns: int, what: str, wider: str | None) -> BadOption:
    grouped = f"groups of {format.group}" if format.group else "one group a row"
    kind = "symmetric" if format.symmetric else "with zero points"
    given = f"{what} in {format.bits} bits, {grouped}, {kind}, rows of {columns}"
    options = [f"--allow-wider (same values as {wider})"] if wider else []
    if columns % BLOCK == 0:
        options.append(f"--allow-requantize (rounded again to {rounded_type(format.bits)})")
    options.append("--allow-dense")
    return refuse(given, "GGUF", "4 or 5 bits, or 8 bits symmetric, in groups of whole blocks of 32",
                  f"allow {' or '.join(options)}")
