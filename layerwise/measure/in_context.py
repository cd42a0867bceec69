"""Predicting a number from a table of known rows, without training: a Gaussian process on standardized columns.

It stands where a pretrained tabular model would: the known rows are its context. One length scale for all columns,
the scale and the noise are those of a small grid with the highest likelihood of the known rows.

Shapes: N known rows, M asked rows, F columns.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SCALES = (0.5, 1.0, 2.0, 4.0)
NOISES = (0.03, 0.1, 0.3, 1.0)


@dataclass(frozen=True)
class Prediction:
    """Mean and deviation of what is asked, [M], and the log-likelihood of what was known."""

    mean_M: Tensor
    deviation_M: Tensor
    likelihood: float


def predict(x_NF: Tensor, y_N: Tensor, asked_MF: Tensor) -> Prediction:
    """Mean and deviation at the asked rows, in the units of y."""
    x_NF, asked_MF, y_N = x_NF.double(), asked_MF.double(), y_N.double()
    centre, spread = x_NF.mean(0), x_NF.std(0).clamp(min=1e-9)
    x_NF, asked_MF = (x_NF - centre) / spread, (asked_MF - centre) / spread
    mean, size = y_N.mean(), y_N.std().clamp(min=1e-9)
    target_N = (y_N - mean) / size
    near_NN, near_MN = (torch.cdist(a, x_NF).square() / x_NF.shape[1] for a in (x_NF, asked_MF))
    best: Prediction | None = None
    for scale, noise in itertools.product(SCALES, NOISES):
        kernel_NN = torch.exp(-near_NN / (2 * scale**2)) + noise * torch.eye(len(x_NF), dtype=torch.float64)
        root_NN = torch.linalg.cholesky(kernel_NN)
        weights_N1 = torch.cholesky_solve(target_N[:, None], root_NN)
        fit = float(target_N @ weights_N1[:, 0]) / 2 + float(root_NN.diagonal().log().sum())
        likelihood = -fit - len(x_NF) / 2 * math.log(2 * math.pi)
        if best is None or likelihood > best.likelihood:
            cross_MN = torch.exp(-near_MN / (2 * scale**2))
            solved_NM = torch.linalg.solve_triangular(root_NN, cross_MN.T, upper=False)
            variance_M = (1 + noise - solved_NM.square().sum(0)).clamp(min=0)
            best = Prediction(mean + size * (cross_MN @ weights_N1)[:, 0], size * variance_M.sqrt(), likelihood)
    assert best is not None
    return best


def nearest(x_NF: Tensor, y_N: Tensor, asked_MF: Tensor, k: int = 5) -> Tensor:
    """Mean of y over the k known rows closest to each asked one, on standardized columns, [M]."""
    centre, spread = x_NF.double().mean(0), x_NF.double().std(0).clamp(min=1e-9)
    away_MN = torch.cdist((asked_MF.double() - centre) / spread, (x_NF.double() - centre) / spread)
    found_M: Tensor = y_N.double()[away_MN.topk(min(k, len(y_N)), largest=False).indices].mean(1)
    return found_M


def linear(x_NF: Tensor, y_N: Tensor, asked_MF: Tensor, strength: float = 1.0) -> Tensor:
    """Least squares on standardized columns with a ridge of `strength`, [M]."""
    centre, spread = x_NF.double().mean(0), x_NF.double().std(0).clamp(min=1e-9)
    known_NF, asked_MF = (x_NF.double() - centre) / spread, (asked_MF.double() - centre) / spread
    mean, unit_FF = y_N.double().mean(), torch.eye(x_NF.shape[1], dtype=torch.float64)
    slope_F = torch.linalg.solve(known_NF.T @ known_NF + strength * unit_FF, known_NF.T @ (y_N.double() - mean))
    found_M: Tensor = mean + asked_MF @ slope_F
    return found_M


def selected(x_NF: Tensor, y_N: Tensor, always: Sequence[int], count: int, most_alike: float = 0.9) -> list[int]:
    """`always` and up to `count` further columns, each the one that raises the likelihood of y most.

    Columns that correlate above `most_alike` with an earlier candidate are not tried, nor is one that adds nothing.
    """
    scaled_NF = (x_NF.double() - x_NF.double().mean(0)) / x_NF.double().std(0).clamp(min=1e-9)
    alike_FF = (scaled_NF.T @ scaled_NF / len(x_NF)).abs()
    candidates: list[int] = []
    for column in range(x_NF.shape[1]):
        if column not in always and all(alike_FF[column, other] < most_alike for other in candidates):
            candidates.append(column)
    chosen, best = list(always), -math.inf
    for _ in range(count):
        tried = {column: predict(x_NF[:, [*chosen, column]], y_N, x_NF[:1, [*chosen, column]]).likelihood
                 for column in candidates if column not in chosen}
        column = max(tried, key=tried.__getitem__, default=-1)
        if column < 0 or tried[column] <= best:
            break
        chosen, best = [*chosen, column], tried[column]
    return chosen
