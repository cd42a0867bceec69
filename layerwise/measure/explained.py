"""How much of a score different predictors explain: R^2 of least squares, and whether a larger model explains more.

    R2 = 1 - |y - X b|^2 / |y - mean y|^2;   F = ((R2_large - R2_small) / extra) / ((1 - R2_large) / rest)

with `extra` the columns that the larger model adds in rank and `rest` the observations less its rank.

Shapes: N observations, P predictors.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from layerwise.errors import BadData

Columns = NDArray[np.float64]


@dataclass(frozen=True)
class Fit:
    """R^2 of a model with a constant, and its rank."""

    r2: float
    rank: int
    observations: int


def fit(y_N: ArrayLike, x_NP: Columns) -> Fit:
    """Least squares with a constant added. Raises BadData where `y_N` does not vary."""
    y = np.asarray(y_N, dtype=np.float64)
    spread = float(((y - y.mean()) ** 2).sum())
    if len(y) < 3 or spread <= 1e-18 * max(1.0, float((y**2).sum())):
        raise BadData("scores that are all the same", expected="scores that vary",
                      do="there is nothing to explain; look at the scores themselves")
    design = np.column_stack([np.ones(len(y)), x_NP])
    solution, _, rank, _ = np.linalg.lstsq(design, y, rcond=None)
    return Fit(1 - float(((y - design @ solution) ** 2).sum()) / spread, int(rank), len(y))


def factor(labels: Sequence[Hashable]) -> Columns:
    """A column of zeros and ones for every distinct label, [N, P]."""
    kinds = sorted(set(labels), key=str)
    return np.array([[float(label == kind) for kind in kinds] for label in labels])


def interaction(labels: Sequence[Hashable], x_N: ArrayLike) -> Columns:
    """A constant and a slope on `x_N` for every distinct label, [N, 2P]."""
    own = factor(labels)
    return np.column_stack([own, own * np.asarray(x_N, dtype=np.float64)[:, None]])


def f_test(small: Fit, large: Fit) -> float:
    """Probability of such a gain if the columns that `large` adds to `small` meant nothing; 1 if none is added."""
    from scipy.stats import f

    extra, rest = large.rank - small.rank, large.observations - large.rank
    if extra <= 0 or rest <= 0:
        return 1.0
    gain = (large.r2 - small.r2) / extra
    return float(f.sf(gain / max((1 - large.r2) / rest, 1e-300), extra, rest))


def within(labels: Sequence[Hashable], x_N: ArrayLike, y_N: ArrayLike) -> float:
    """Correlation of x and y after the mean of each label is taken from both; zero where either does not vary."""
    own = factor(labels)
    x, y = (v - own @ (own.T @ v / own.sum(0)) for v in (np.asarray(x_N, float), np.asarray(y_N, float)))
    size = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / size if size > 1e-12 else 0.0
