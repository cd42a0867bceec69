"""Where along the depth some items leave the states of others: distance to the nearest reference states, normalized.

Source: arXiv 2509.22518 (there wrong answers leave the states of correct ones). The same reads whether inputs are out
of a distribution, or whether a compressed model still keeps to the original's states.

Shapes: N items, L layers, C hidden width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from layerwise.measure.neighbours import deviation
from layerwise.measure.separation import standardized

ALPHA, HOLD = 1.5, 3
"""An item has left where it is so many deviations away, for so many layers."""


def distances(states_NLC: Tensor, reference: Tensor, judged: Tensor, scale: bool) -> Tensor:
    """Distance of the judged items to the reference at every layer, [L, N]; `scale` standardizes dimensions."""
    layers = []
    for layer in states_NLC.unbind(1):
        near, points = layer[reference], layer[judged]
        if scale:
            near, points = standardized(near, near), standardized(points, near)
        layers.append(deviation(points, near))
    return torch.stack(layers)


def normalized(distance_LN: Tensor, wrong_N: Tensor) -> Tensor:
    """Distances in standard deviations of the items that are not `wrong_N`, from their mean, [L, N]."""
    right_LN = distance_LN[:, ~wrong_N]
    return (distance_LN - right_LN.mean(1, keepdim=True)) / right_LN.std(1, keepdim=True)


def departure(z_LN: Tensor, alpha: float = ALPHA, hold: int = HOLD) -> list[int | None]:
    """The first layer from which z stays above alpha for `hold` layers, for every item."""
    found: list[int | None] = []
    for column in (z_LN > alpha).T.tolist():
        runs = (layer for layer in range(len(column) - hold + 1) if all(column[layer : layer + hold]))
        found.append(next(runs, None))
    return found
