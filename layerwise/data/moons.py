"""Two interleaved half circles: the smallest data on which depth matters.

Shapes: N points of two coordinates.
"""

from __future__ import annotations

import math

import torch

from layerwise.data.labelled import Labelled


def moons(count: int, seed: int, noise: float = 0.2) -> Labelled:
    """`count` points, float32 [N, 2]: the upper unit half circle, and the lower one about (1, 0.5).

    The same sets as scikit-learn's `make_moons`, with angles drawn instead of evenly spaced.
    """
    generator = torch.Generator().manual_seed(seed)
    labels_N = torch.randint(2, (count,), generator=generator)
    angle_N = math.pi * torch.rand(count, generator=generator)
    side_N = 1.0 - 2.0 * labels_N
    x_N2 = torch.stack([labels_N + side_N * angle_N.cos(), 0.5 * labels_N + side_N * angle_N.sin()], 1)
    return Labelled(x_N2 + noise * torch.randn(count, 2, generator=generator), labels_N, 2, "moons")
