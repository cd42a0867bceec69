"""How the loss grows while layers change one after another in some order."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev

import numpy as np


@dataclass(frozen=True)
class Curve:
    """The loss, nats per token, with `points` layers changed: from none to all, ascending."""

    points: Sequence[int]
    losses: Sequence[float]

    @property
    def area(self) -> float:
        """Mean growth of the loss over the whole curve, straight between its points, nats per token."""
        return float(np.trapezoid(np.subtract(self.losses, self.losses[0]), self.points)) / self.points[-1]

    def share(self, growth: float) -> float:
        """Share of the layers that can change before perplexity is `growth` times what it was."""
        limit, last = self.losses[0] + math.log(growth), (self.points[0], self.losses[0])
        for k, loss in zip(self.points, self.losses, strict=True):
            if loss > limit:
                return (last[0] + (limit - last[1]) / (loss - last[1]) * (k - last[0])) / self.points[-1]
            last = k, loss
        return 1.0


CONTROLS = ("random", "reversed", "depth")
Values = dict[str, float]


def against_chance(curves: Mapping[str, Curve], value: Callable[[Curve], float]) -> tuple[Values, Values]:
    """`value` of every order, and of the controls: random orders together, reversed ones, order of depth."""
    found = {name: round(value(curve), 4) for name, curve in curves.items()}
    control = {name: found.pop(name) for name in list(found) if name.startswith(CONTROLS)}
    draws = [control.pop(name) for name in list(control) if name.startswith("random")]
    return found, control | {"random mean": round(mean(draws), 4), "random deviation": round(stdev(draws), 4)}
