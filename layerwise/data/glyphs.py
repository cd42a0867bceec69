"""Digits that need no download: a small bitmap font under random slant, turn, size, place, contrast and noise.

Like handwritten digits they have ten classes and enough freedom that a network generalises rather than
remembers; `warp` and `noise` set how hard they are.

Shapes: N pictures, S pixels a side, one channel.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from layerwise.data.labelled import Labelled

FONT = (
    "01110 10001 10011 10101 11001 10001 01110",
    "00100 01100 00100 00100 00100 00100 01110",
    "01110 10001 00001 00110 01000 10000 11111",
    "01110 10001 00001 00110 00001 10001 01110",
    "00010 00110 01010 10010 11111 00010 00010",
    "11111 10000 11110 00001 00001 10001 01110",
    "00110 01000 10000 11110 10001 10001 01110",
    "11111 00001 00010 00100 01000 01000 01000",
    "01110 10001 10001 01110 10001 10001 01110",
    "01110 10001 10001 01111 00001 00010 01100",
)
"""Rows of five cells, top first, one string a digit."""


def glyphs(count: int, seed: int, *, side: int = 16, warp: float = 1.0, noise: float = 0.15) -> Labelled:
    """`count` digits, float32 [N, 1, S, S] within 0 and 1. Other seeds give other pictures.

    `warp` scales turn (up to 0.35 radians), slant (0.3), size (20 %) and place (a fifth of the picture);
    `noise` is the standard deviation of what is added to every pixel.
    """
    generator = torch.Generator().manual_seed(seed)

    def spread(*shape: int) -> Tensor:
        return warp * (2 * torch.rand(*shape, generator=generator) - 1)

    labels_N = torch.randint(len(FONT), (count,), generator=generator)
    turn_N, slant_N = 0.35 * spread(count), 0.3 * spread(count)
    scale_N, shift_N2 = 1.25 * (1 + 0.2 * spread(count)), 0.2 * spread(count, 2)
    cos, sin = turn_N.cos() * scale_N, turn_N.sin() * scale_N
    x_row, y_row = torch.stack([cos, slant_N - sin], 1), torch.stack([sin, cos], 1)
    affine_N23 = torch.cat([torch.stack([x_row, y_row], 1), shift_N2[..., None]], 2)
    grid_NSS2 = F.affine_grid(affine_N23, [count, 1, side, side], align_corners=False)
    ink_N1SS = F.grid_sample(_font()[labels_N], grid_NSS2, align_corners=False)
    contrast_N = 1 - 0.25 * torch.rand(count, generator=generator)
    pixels_N1SS = ink_N1SS * contrast_N[:, None, None, None]
    pixels_N1SS = pixels_N1SS + noise * torch.randn(pixels_N1SS.shape, generator=generator)
    return Labelled(pixels_N1SS.clamp(0, 1), labels_N, len(FONT), "glyphs")


def _font() -> Tensor:
    """The font as pictures, [10, 1, 28, 28]: three pixels a cell, edges softened."""
    cells = torch.tensor([[[float(cell) for cell in row] for row in digit.split()] for digit in FONT])
    large = F.interpolate(cells[:, None], scale_factor=3, mode="nearest")
    return F.avg_pool2d(F.pad(large, (7, 6, 4, 3)), 3, stride=1, padding=1)
