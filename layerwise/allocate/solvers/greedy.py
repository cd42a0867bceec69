"""Choice by marginal rate: give up the least predicted loss per unit of cost saved, until the limits hold.

Starts from the choice that loses least in every group. Each step takes the change with the smallest added
loss per saving, among changes that cost more in no currency; savings count in the currencies that are still
over, as shares of their limits. What the last step saved beyond need is spent on the best changes back.
Not exact, but close where no single choice is a large part of the budget.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from layerwise.allocate.choices import Choice, Groups
from layerwise.allocate.solvers.base import Solver
from layerwise.allocate.solvers.problem import ROUNDING, Floats, Indices, Problem

Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Greedy(Solver):
    """No settings."""

    name: ClassVar[str] = "greedy"

    def choose(self, groups: Groups, limits: Mapping[str, float], seed: int = 0) -> list[Choice]:
        problem = Problem.of(groups, limits)
        return problem.pick(refill(problem, _shrink(problem)))


def _shrink(problem: Problem) -> Indices:
    choice_G = problem.best()
    while (over_K := problem.spent(choice_G) > 1 + ROUNDING).any():
        choice_G = _step_until_fewer_are_over(problem, choice_G, over_K)
    return choice_G


def _step_until_fewer_are_over(problem: Problem, choice_G: Indices, over_K: Flags) -> Indices:
    choice_G = choice_G.copy()
    spent_K = problem.spent(choice_G)
    rates = [_cheapest_change(problem, g, int(choice_G[g]), over_K) for g in range(len(choice_G))]
    rate_G, next_G = (np.array(column) for column in zip(*rates, strict=True))
    while (spent_K[over_K] > 1 + ROUNDING).all():
        g = int(np.argmin(rate_G))
        if not np.isfinite(rate_G[g]):
            raise problem.refuse("greedy", choice_G)
        spent_K += problem.cost_KGC[:, g, next_G[g]] - problem.cost_KGC[:, g, choice_G[g]]
        choice_G[g] = next_G[g]
        rate_G[g], next_G[g] = _cheapest_change(problem, g, int(choice_G[g]), over_K)
    return choice_G


def _cheapest_change(problem: Problem, g: int, now: int, over_K: Flags) -> tuple[float, int]:
    """The smallest added loss per saving in group `g`, infinite where nothing saves, and its choice."""
    change_KC = problem.cost_KGC[:, g] - problem.cost_KGC[:, g, now, None]
    added_C = problem.loss_GC[g] - problem.loss_GC[g, now]
    saved_C = -change_KC[over_K].sum(0)
    useful_C = (change_KC <= 0).all(0) & (saved_C > 0)
    rate_C = np.full(len(added_C), np.inf)
    rate_C[useful_C] = added_C[useful_C] / saved_C[useful_C]
    best = int(np.argmin(rate_C))
    return float(rate_C[best]), best


def refill(problem: Problem, choice_G: Indices) -> Indices:
    """Take losses back, the largest first, as long as a change fits into what is left."""
    everyone = np.arange(len(choice_G))
    while True:
        room_K: Floats = 1 + ROUNDING / 2 - problem.spent(choice_G)
        change_KGC = problem.cost_KGC - problem.cost_KGC[:, everyone, choice_G][:, :, None]
        gain_GC = problem.loss_GC[everyone, choice_G][:, None] - problem.loss_GC
        fits_GC = (change_KGC <= room_K[:, None, None]).all(0) & (gain_GC > 0)
        if not fits_GC.any():
            return choice_G
        g, c = np.unravel_index(np.argmax(np.where(fits_GC, gain_GC, -np.inf)), gain_GC.shape)
        choice_G = choice_G.copy()
        choice_G[g] = c
