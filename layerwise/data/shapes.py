"""Pictures that need no download: one bright shape on a dark ground, labelled by its kind.

Shapes: N pictures, C = 3 channels, S pixels a side.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

SIDE = 32
KINDS = ("disc", "square", "triangle", "stripes")


def draw(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """`count` pictures, uint8 [N, 3, S, S], and their labels, int64 [N], indices into KINDS.

    Position, size, angle, both colours and the noise are random; the label is not readable from colour.
    """

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    labels_N = torch.randint(len(KINDS), (count,), generator=generator)
    radius_N = SIDE * (0.22 + 0.14 * uniform(count))
    centre_N2 = SIDE * 0.5 + (SIDE * 0.5 - radius_N)[:, None] * (2 * uniform(count, 2) - 1)
    inside_NSS = _inside(labels_N, centre_N2, radius_N, uniform(count) * 2 * math.pi)
    ground_N3, paint_N3 = 0.45 * uniform(count, 3), 0.55 + 0.45 * uniform(count, 3)
    pixels_NCSS = torch.where(inside_NSS[:, None], paint_N3[..., None, None], ground_N3[..., None, None])
    pixels_NCSS = pixels_NCSS + 0.05 * torch.randn(pixels_NCSS.shape, generator=generator)
    return (pixels_NCSS.clamp(0, 1) * 255).round().to(torch.uint8), labels_N


def _inside(labels_N: Tensor, centre_N2: Tensor, radius_N: Tensor, angle_N: Tensor) -> Tensor:
    """Which pixels each shape covers, bool [N, S, S]."""
    grid = torch.arange(SIDE) + 0.5
    y_NSS = (grid[None, :, None] - centre_N2[:, 0, None, None]) / radius_N[:, None, None]
    x_NSS = (grid[None, None, :] - centre_N2[:, 1, None, None]) / radius_N[:, None, None]
    cos, sin = angle_N.cos()[:, None, None], angle_N.sin()[:, None, None]
    u_NSS, v_NSS = x_NSS * cos + y_NSS * sin, y_NSS * cos - x_NSS * sin
    disc = u_NSS**2 + v_NSS**2 < 1
    square = torch.maximum(u_NSS.abs(), v_NSS.abs()) < 0.8
    slope = v_NSS + math.sqrt(3) * u_NSS.abs()
    triangle = (slope < 1) & (v_NSS > -0.5)
    stripes = disc & ((v_NSS * 2.5).floor() % 2 == 0)
    return torch.stack([disc, square, triangle, stripes])[labels_N, torch.arange(len(labels_N))]
