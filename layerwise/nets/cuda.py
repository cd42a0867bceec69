"""A packed matrix laid out for torch's kernels on an NVIDIA GPU, from which its codes can still be read back.

The int4 kernel (tinygemm) computes w = (nibble - 8) * scale + zero, rounded to bfloat16, as that of `int4.py` does on
a CPU; only its tiles differ. A word of 32 bits holds 8 inputs of one output. Of 32 inputs it has the pairs 4 i + q for
i = 0 to 3, first inputs in its low half and second ones in its high half; q = 0 to 3 lie side by side, then 8 outputs.
The layout is that of `aten/src/ATen/native/cuda/int4mm.cu` in PyTorch. Whether this GPU and this torch have it is tried
once a device, by converting a small matrix, reading it back and multiplying; where not, products are made dense.

Shapes: O outputs, P outputs padded to whole tiles, I inputs padded to whole groups, D digits (1 or 2),
K depth tiles of J words a lane, G groups of the kernel, M rows of x.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from layerwise.nets.int4 import CHUNK, digits, from_nibbles, kernel_group, scale_zero_pairs, to_nibbles
from layerwise.spec import Format

FEW_ROWS = 128
"""Up to this many rows of x the packed kernels are used: they unpack for every 16 rows, a dense product once."""

OUTPUTS = 8
"""Outputs in a tile; a tile of J words is 32 * J inputs deep."""


@dataclass(frozen=True)
class CudaInt4:
    """Words of the kernel's tiles, int32 [P / 8, K, 32, J]; scale and zero of each group, [D * G, P, 2]."""

    tiles: Tensor
    scale_zero: Tensor
    format: Format
    outputs: int
    inputs: int
    group: int

    @staticmethod
    def fits(format: Format, inputs: int, device: torch.device) -> bool:
        """Whether the kernel of this device can hold a matrix of this format with `inputs` (padded) inputs."""
        return kernel_group(format, inputs) is not None and int4_runs(device)

    @staticmethod
    def build(codes_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor | None, format: Format) -> CudaInt4:
        """From codes (padded to whole groups) and their scales; the codes themselves are not kept."""
        outputs, inputs = codes_OI.shape
        group = kernel_group(format, inputs)
        assert group is not None
        missing, words = -outputs % OUTPUTS, _words(digits(format.bits) * inputs)
        tiles = [_convert(to_nibbles(codes, format.bits), words)
                 for codes in F.pad(codes_OI, (0, 0, 0, missing)).split(CHUNK)]
        pairs = F.pad(scale_zero_pairs(scale_OG, zero_OG, format, inputs // group), (0, 0, 0, missing))
        return CudaInt4(torch.cat(tiles), pairs.contiguous(), format, outputs, inputs, group)

    def product(self, x_MI: Tensor) -> Tensor:
        """x w', bfloat16 [M, O]; `x_MI` may lack the padded inputs."""
        if x_MI.shape[1] < self.inputs:
            x_MI = F.pad(x_MI, (0, self.inputs - x_MI.shape[1]))
        if digits(self.format.bits) == 2:
            x_MI = torch.cat([x_MI, x_MI], 1)
        y_MP = torch.ops.aten._weight_int4pack_mm(x_MI.contiguous(), self.tiles, self.group, self.scale_zero)
        return y_MP[:, : self.outputs]  # type: ignore[no-any-return]

    def codes(self, start: int, stop: int) -> Tensor:
        """The codes of rows `start` to `stop`, uint8 [stop - start, I]."""
        return self.gather(torch.arange(start, stop, device=self.tiles.device))

    def gather(self, rows_M: Tensor) -> Tensor:
        """The codes of the given rows, uint8 [M, I]."""
        return from_nibbles(untiled(self.tiles, rows_M), self.format.bits)


def tiled(nibbles_PI: Tensor, words: int) -> Tensor:
    """What the kernel's own conversion makes of nibbles, int32 [P / 8, K, 32, J], in plain arithmetic.

    P is a multiple of 8 and I of 32 * J.
    """
    split = nibbles_PI.view(len(nibbles_PI) // OUTPUTS, OUTPUTS, -1, words, 4, 4, 2)  # tile, output, K, J, i, q, half
    shift_i2 = torch.tensor([[4 * place, 16 + 4 * place] for place in range(4)], device=nibbles_PI.device)
    word = (split.permute(0, 2, 1, 5, 3, 4, 6).long() << shift_i2).sum((-2, -1))  # tile, K, output, q, J
    word = torch.where(word >= 2**31, word - 2**32, word).int()
    return word.flatten(2, 3).contiguous()


def untiled(tiles: Tensor, rows_M: Tensor) -> Tensor:
    """The nibbles of some rows of a matrix in tiles, uint8 [M, I]."""
    count, depth, _, words = tiles.shape
    split = tiles.view(count, depth, OUTPUTS, 4, words)
    word_MKqJ = split[rows_M // OUTPUTS, :, rows_M % OUTPUTS]
    shifts = [[4 * place, 16 + 4 * place] for place in range(4)]
    parts = [torch.stack([(word_MKqJ >> shift & 15).to(torch.uint8) for shift in pair], -1) for pair in shifts]
    nibbles = torch.stack(parts, -2)  # M, K, q, J, i, half
    return nibbles.permute(0, 1, 3, 4, 2, 5).reshape(len(rows_M), -1)


@lru_cache
def int4_runs(device: torch.device) -> bool:
    """Whether the device has the int4 kernel in the layout of this file, and what it computes is right."""
    return device.type == "cuda" and _right(lambda: all(_int4_right(device, words) for words in (1, 2, 4)))


@lru_cache
def int8_runs(device: torch.device) -> bool:
    """Whether the device has torch's int8 kernel, and what it computes is right."""
    return device.type == "cuda" and _right(lambda: _int8_right(device))


def _right(check: Callable[[], bool]) -> bool:
    try:
        return check()
    except RuntimeError:  # no such kernel in this torch, or none for this GPU
        return False


def _int4_right(device: torch.device, words: int) -> bool:
    generator = torch.Generator().manual_seed(0)
    nibbles = torch.randint(16, (16, 32 * words), generator=generator, dtype=torch.uint8).to(device)
    x_MI = torch.randn(3, 32 * words, generator=generator).bfloat16().to(device)
    pairs = torch.tensor([0.5, 0.25]).bfloat16().to(device).expand(words, 16, 2).contiguous()
    tiles = _convert(nibbles, words)
    y_MO = torch.ops.aten._weight_int4pack_mm(x_MI, tiles, 32, pairs)
    exact_MO = x_MI.double() @ ((nibbles.double() - 8) * 0.5 + 0.25).T
    return torch.equal(tiles, tiled(nibbles, words)) and _near(y_MO, exact_MO)


def _int8_right(device: torch.device) -> bool:
    generator = torch.Generator().manual_seed(0)
    codes_OI = torch.randint(-128, 128, (24, 48), generator=generator, dtype=torch.int8).to(device)
    x_MI = torch.randn(3, 48, generator=generator).bfloat16().to(device)
    y_MO = torch._weight_int8pack_mm(x_MI, codes_OI, torch.full((24,), 0.5).bfloat16().to(device))
    return _near(y_MO, x_MI.double() @ codes_OI.double().T * 0.5)


def _near(y_MO: Tensor, exact_MO: Tensor) -> bool:
    return bool(((y_MO.double() - exact_MO).abs() <= 2**-7 * exact_MO.abs() + 2**-12 * exact_MO.abs().max()).all())


def _convert(nibbles_PI: Tensor, words: int) -> Tensor:
    """The kernel's own conversion, which reads the first of two inputs from the high half of a byte."""
    bytes_Ph = nibbles_PI[:, ::2] << 4 | nibbles_PI[:, 1::2]
    tiles: Tensor = torch.ops.aten._convert_weight_to_int4pack(bytes_Ph.contiguous(), 2 * words)
    return tiles


def _words(inputs: int) -> int:
    """Words a lane reads at once: as many as divide the inputs, since the kernel reads them in one load."""
    return next(words for words in (4, 2, 1) if inputs % (32 * words) == 0)
