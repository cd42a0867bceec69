"""Stopping a comparison early without fooling oneself: intervals that hold at every number of items at once.

A comparison looks after every item, so an interval made for one look would be wrong too often. A confidence sequence
covers the mean difference at all times together with probability `level`. Differences between two known ends get the
predictable plug-in empirical-Bernstein sequence of Waudby-Smith and Ramdas (2024, theorem 2; arXiv 2010.09686), exact
for any number of items. Losses have no ends; they get the asymptotic sequence of Waudby-Smith, Arbour, Sinha, Kennedy
and Ramdas (2024, theorem 2.2; arXiv 2103.06476), which relies on the central limit theorem as a bootstrap does and so
waits for some items. `Stop` spends a little of the allowed error on stopping early and keeps the rest for the ordinary
interval of a comparison that ran to its end; together they stay within it by the union bound.

Shapes: N items.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from layerwise.data.bootstrap import Interval
from layerwise.errors import BadOption

Verdict = Literal["within", "above", "below", "open"]
"""Where an interval lies: within the tolerance around 0, wholly above it, wholly below it, or across an end."""


@dataclass(frozen=True)
class Stop:
    """When to stop: as soon as the difference is known to lie within `tolerance` of 0 or outside it.

    `early` is the error allowed for stopping before the end, `level` the confidence of the whole procedure, `least`
    the number of items before the first look.
    """

    tolerance: float
    level: float = 0.95
    early: float = 0.01
    least: int = 8

    def __post_init__(self) -> None:
        if self.tolerance <= 0 or not 0 < self.early < 1 - self.level < 1 or self.least < 2:
            raise BadOption(f"tolerance={self.tolerance}, level={self.level}, early={self.early}, least={self.least}",
                            expected="a positive tolerance, early below 1 - level, two items or more",
                            do="use Stop(tolerance=0.01)")

    @property
    def last_level(self) -> float:
        """Confidence of the ordinary interval after the last item."""
        return self.level + self.early

    def early_interval(self, differences: ArrayLike, ends: tuple[float, float] | None, most: int) -> Interval | None:
        """An interval that settles the question now, or None; `most` is the number of items there could be."""
        x_N = np.asarray(differences, dtype=np.float64)
        if not self.least <= len(x_N) < most:
            return None
        low, high = bernstein(x_N, *ends, 1 - self.early) if ends else asymptotic(x_N, 1 - self.early, most)
        found = Interval(low, float(x_N.mean()), high, self.level)
        return None if verdict(found, self.tolerance) == "open" else found


def verdict(interval: Interval, tolerance: float) -> Verdict:
    """Where the interval lies."""
    if interval.low > tolerance:
        return "above"
    if interval.high < -tolerance:
        return "below"
    return "within" if -tolerance <= interval.low and interval.high <= tolerance else "open"


def bernstein(x_N: NDArray[np.float64], low: float, high: float, level: float = 0.95) -> tuple[float, float]:
    """Ends of the empirical-Bernstein sequence after the last of N items, each between `low` and `high`."""
    y_N, count_N = (x_N - low) / (high - low), np.arange(1, len(x_N) + 1)
    mean_N = (0.5 + np.cumsum(y_N)) / (count_N + 1)
    variance_N = (0.25 + np.cumsum((y_N - mean_N) ** 2)) / (count_N + 1)
    mean_before_N, variance_before_N = np.r_[0.5, mean_N[:-1]], np.r_[0.25, variance_N[:-1]]
    bet_N = np.sqrt(2 * math.log(2 / (1 - level)) / (variance_before_N * count_N * np.log1p(count_N))).clip(max=0.5)
    spread_N = (y_N - mean_before_N) ** 2 * (-np.log1p(-bet_N) - bet_N)
    half = (math.log(2 / (1 - level)) + spread_N.sum()) / bet_N.sum()
    centre = (bet_N * y_N).sum() / bet_N.sum()
    ends = np.clip([centre - half, centre + half], 0, 1) * (high - low) + low
    return float(ends[0]), float(ends[1])


def asymptotic(x_N: NDArray[np.float64], level: float = 0.95, at: int = 100) -> tuple[float, float]:
    """Ends of the asymptotic sequence after the last of N items, narrowest when there are `at` of them."""
    alpha, count = 1 - level, len(x_N)
    rho2 = (-2 * math.log(alpha) + math.log(-2 * math.log(alpha) + 1)) / at
    growth = count * rho2 + 1
    half = x_N.std(ddof=1) * math.sqrt(2 * growth / (count**2 * rho2) * math.log(math.sqrt(growth) / alpha))
    return float(x_N.mean() - half), float(x_N.mean() + half)


def unseen(count: int, level: float) -> float:
    """The largest probability of an event that may well not show in `count` items: 1 - (1 - level)^(1 / count).

    Where all items agree, resampling them shows no uncertainty at all, and this is what remains (the "rule of three",
    Hanley and Lippman-Hand 1983).
    """
    return float(1 - (1 - level) ** (1 / count))
