"""A packed matrix laid out for torch's int4 CPU kernel, from which its codes can still be read back.

The kernel computes w = (nibble - 8) * scale + zero. Codes of up to 4 bits are moved into the nibble's range;
wider codes are two base-16 digits, and the matrix becomes one of twice the inputs, [16 * high | low], so that
one product with [x | x] is exact up to the rounding of its bfloat16 result.

Shapes: O outputs, P outputs padded to whole tiles, I inputs padded to whole groups, D digits (1 or 2),
G groups of the kernel, M rows of x.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from layerwise.spec import Format

GROUPS = (256, 128, 64, 32)
CHUNK = 4096

to_tiles = torch.ops.aten._convert_weight_to_int4pack_for_cpu
multiply = torch.ops.aten._weight_int4pack_mm_for_cpu


@dataclass(frozen=True)
class Int4Matrix:
    """Nibbles in the kernel's tiles, [P, D * I / 2] bytes; scale and zero of each group, [D * G, P, 2]."""

    tiles: Tensor
    scale_zero: Tensor
    format: Format
    outputs: int
    inputs: int
    group: int

    @staticmethod
    def fits(format: Format, inputs: int) -> bool:
        """Whether this processor's kernel can hold a matrix of this format with `inputs` (padded) inputs."""
        return kernel_group(format, inputs) is not None and tile_rows() is not None

    @staticmethod
    def build(codes_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor | None, format: Format) -> Int4Matrix:
        """From codes (padded to whole groups) and their scales; the codes themselves are not kept."""
        outputs, inputs = codes_OI.shape
        group, tile = kernel_group(format, inputs), tile_rows()
        assert group is not None and tile is not None
        missing = -outputs % tile
        tiles = codes_OI.new_empty(outputs + missing, digits(format.bits) * inputs // 2)
        for start in range(0, outputs + missing, CHUNK):
            nibbles = to_nibbles(codes_OI[start : start + CHUNK], format.bits)
            nibbles = F.pad(nibbles, (0, 0, 0, min(CHUNK, outputs + missing - start) - len(nibbles)))
            tiles[start : start + CHUNK] = to_tiles(nibbles.int(), 1)
        scale_zero = F.pad(scale_zero_pairs(scale_OG, zero_OG, format, inputs // group), (0, 0, 0, missing))
        return Int4Matrix(tiles, scale_zero.contiguous(), format, outputs, inputs, group)

    def product(self, x_MI: Tensor) -> Tensor:
        """x w', bfloat16 [M, O]; `x_MI` may lack the padded inputs."""
        if x_MI.shape[1] < self.inputs:  # even padding by nothing would copy
            x_MI = F.pad(x_MI, (0, self.inputs - x_MI.shape[1]))
        if digits(self.format.bits) == 2:
            x_MI = torch.cat([x_MI, x_MI], 1)
        y_MP: Tensor = multiply(x_MI, self.tiles, self.group, self.scale_zero)
        return y_MP if y_MP.shape[1] == self.outputs else y_MP[:, : self.outputs]

    def codes(self, start: int, stop: int) -> Tensor:
        """The codes of rows `start` to `stop`, uint8 [stop - start, I]."""
        tile = tile_rows()
        assert tile is not None
        first = start - start % tile
        nibbles = _untile(self.tiles[first : stop + -stop % tile], tile)
        return from_nibbles(nibbles[start - first : stop - first], self.format.bits)

    def gather(self, rows_M: Tensor) -> Tensor:
        """The codes of the given rows, uint8 [M, I]."""
        tile = tile_rows()
        assert tile is not None
        half = tile // 2
        bytes_TIH = self.tiles.view(len(self.tiles) // tile, -1, half)
        row_M = rows_M % tile
        nibbles = bytes_TIH[rows_M // tile, :, row_M % half] >> (4 * (row_M // half)).to(torch.uint8)[:, None]
        return from_nibbles(nibbles & 15, self.format.bits)


def digits(bits: int) -> int:
    """How many base-16 digits a code takes."""
    return 1 if bits <= 4 else 2


def kernel_group(format: Format, inputs: int) -> int | None:
    """The largest group size of the kernel that divides the format's group; None where there is none."""
    return next((group for group in GROUPS if (format.group or inputs) % group == 0), None)


@lru_cache(maxsize=1)
def tile_rows() -> int | None:
    """Rows in one tile of the kernel's layout on this processor; None where the layout is not the known one.

    A tile holds, input by input, its first half of rows in low nibbles and its second half in high nibbles.
    """
    generator = torch.Generator().manual_seed(0)
    nibbles = torch.randint(16, (128, 32), generator=generator, dtype=torch.uint8)
    tiles = to_tiles(nibbles.int(), 1)
    return next((rows for rows in (64, 32) if torch.equal(_untile(tiles, rows), nibbles)), None)


def _untile(tiles: Tensor, tile: int) -> Tensor:
    """Nibbles [P, D * I] of whole tiles."""
    bytes_THI = tiles.view(len(tiles) // tile, -1, tile // 2).transpose(1, 2).contiguous()
    return torch.stack([bytes_THI & 15, bytes_THI >> 4], 1).view(len(tiles), -1)


def _offset(bits: int) -> int:
    """What is added to a code before it is cut into nibbles.

    5 and 6 bits are centred so that the low digit is signed, which keeps both halves of the product small.
    """
    half: int = 2 ** (bits - 1)
    return 8 - half if digits(bits) == 1 else 128 - half + (8 if bits < 8 else 0)


def to_nibbles(codes_OI: Tensor, bits: int) -> Tensor:
    """Codes as nibbles of the kernel, uint8 [O, D * I]."""
    moved = codes_OI + _offset(bits)
    return moved if digits(bits) == 1 else torch.cat([moved >> 4, moved & 15], 1)


def from_nibbles(nibbles: Tensor, bits: int) -> Tensor:
    """The inverse of `to_nibbles`."""
    if digits(bits) == 2:
        high, low = nibbles.chunk(2, 1)
        nibbles = (high << 4) + low
    return nibbles - _offset(bits)


def scale_zero_pairs(scale_OG: Tensor, zero_OG: Tensor | None, format: Format, groups: int) -> Tensor:
    """[D * groups, O, 2]; each value is a stored one times a power of two, hence exact in bfloat16."""
    zero_OG = torch.zeros_like(scale_OG) if zero_OG is None else zero_OG
    repeat = groups // scale_OG.shape[1]
    pair_GO2 = torch.stack([scale_OG, zero_OG], -1).repeat_interleave(repeat, 1).transpose(0, 1)
    if digits(format.bits) == 1:
        return pair_GO2
    scale_GO, zero_GO = pair_GO2.unbind(-1)
    low_zero_GO = scale_GO * 8 if format.bits == 8 else torch.zeros_like(zero_GO)
    return torch.cat([torch.stack([scale_GO * 16, zero_GO], -1), torch.stack([scale_GO, low_zero_GO], -1)])
