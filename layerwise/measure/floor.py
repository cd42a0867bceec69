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

from layerwise.measure.base import Trial
from layerwise.measure.scores import Column
from layerwise.stack.base import Stack

FLOOR = "floor"
"""The part under which the floor is tried, and the column that holds it."""

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


def floor_trials(stack: Stack) -> list[Trial]:
    """What must be tried to know the floor; nothing in float32, where it is lost in the noise of the sample."""
    dtype = getattr(stack, "dtype", torch.float32)
    return [Trial(layer, FLOOR) for layer in depths(len(stack))] if dtype.itemsize < 4 else []


def floor_of(values: Mapping[Trial, float], layers: int) -> dict[int | str, float]:
    """The floor at every layer, the embedding and the head; empty where it was not tried."""
    measured = {trial.place: value for trial, value in values.items()
                if trial.part == FLOOR and isinstance(trial.place, int)}
    if not measured:
        return {}
    found: dict[int | str, float] = dict(enumerate(floors(measured, layers)))
    return found | {"embedding": found[0], "head": 0.0}


def above(values: Mapping[Trial, float], floor: Mapping[int | str, float]) -> dict[Trial, float]:
    """What was tried, less the floor where it was tried; never below zero."""
    return {trial: max(0.0, value - floor.get(trial.place, 0.0))
            for trial, value in values.items() if trial.part != FLOOR}


def floor_column(instrument: str, unit: str, floor: Mapping[int | str, float]) -> Column:
    """The floor as a column of the instrument that measured it."""
    inside = [value for place, value in floor.items() if isinstance(place, int)]
    outside = {place: value for place, value in floor.items() if isinstance(place, str)}
    about = "what rounding alone does to the output; it is subtracted from the other columns"
    return Column(f"{instrument}:{FLOOR}", tuple(inside), unit, None, about, outside)
