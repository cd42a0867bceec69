"""How far apart two runs of the same model lie when only their rounding differs: the floor under a small KL.

In bfloat16 every operation rounds. Whatever changes a layer by the least amount makes everything after it
round differently, and the predictions then differ by a KL divergence that says nothing about the change (on
a 135M-parameter model more than storing the layer in 8 bits does). The floor is measured by dithering a
layer's output by half a unit in the last place, at some depths, and subtracted. Noise and change are
independent, so that their divergences add, to second order.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

DEPTHS = 5
"""The floor varies slowly with depth; it is measured at so many layers and interpolated between them."""


class Dither(nn.Module):
    """A layer whose output is moved by up to half a unit in the last place before it is rounded."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, *args: object) -> Tensor:
        y: Tensor = self.block(*args)
        uniform = torch.rand(y.shape, generator=torch.Generator().manual_seed(0)).to(y.device) - 0.5
        return (y.float() * (1 + uniform * torch.finfo(y.dtype).eps)).to(y.dtype)


def depths(layers: int) -> list[int]:
    """The layers at which the floor is measured: evenly spaced, first and last included."""
    return sorted({round(place) for place in np.linspace(0, layers - 1, min(layers, DEPTHS))})


def floors(measured: Mapping[int, float], layers: int) -> list[float]:
    """The floor of every layer, linear between those measured; zeros where none was."""
    if not measured:
        return [0.0] * layers
    places = sorted(measured)
    values = np.interp(np.arange(layers), places, [measured[place] for place in places])
    return [float(value) for value in values]
