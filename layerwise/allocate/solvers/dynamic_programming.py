"""Exact choice under one limit: the multiple-choice knapsack, one group after the other.

    best[g, s] = min over c of best[g - 1, s - cost[g, c]] + loss[g, c]

What a choice costs beyond the cheapest of its group is counted in units, rounded up, so the limit is never
passed. The plan is optimal where the unit divides every cost (it is their greatest common divisor where
that gives few enough cells), and otherwise for a limit smaller by at most one unit per group. With links between
choices it is the best of those that read the same layers, not of all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from layerwise.allocate.choices import Choice, Groups
from layerwise.allocate.solvers.base import Solver
from layerwise.allocate.solvers.problem import ROUNDING, Floats, Indices, Problem
from layerwise.errors import BadOption


@dataclass(frozen=True)
class DynamicProgramming(Solver):
    """`cells` is the largest number of units the room above the cheapest plan is divided into."""

    name: ClassVar[str] = "dynamic-programming"
    cells: int = 50_000

    def choose(self, groups: Groups, limits: Mapping[str, float], seed: int = 0) -> list[Choice]:
        """Raises BadOption for more than one limit."""
        if len(limits) != 1:
            raise BadOption(f"dynamic programming under {len(limits)} limits ({', '.join(limits)})",
                            expected="exactly one", do="use the solver 'milp' or 'greedy'")
        problem = Problem.of(groups, limits)
        (currency, limit), = limits.items()
        extras, room = _extras(groups, currency, limit)
        unit = max(_divisor(extras), room / self.cells)
        cells = math.floor(room / unit * (1 + ROUNDING)) if unit else 0
        return problem.pick(_best(problem.loss_GC, [_units(extra, unit) for extra in extras], cells))


def _extras(groups: Groups, currency: str, limit: float) -> tuple[list[Floats], float]:
    """What each choice costs beyond the cheapest of its group, and the room that the limit leaves for it."""
    costs = [np.array([choice.cost[currency] for choice in group]) for group in groups]
    room = limit - math.fsum(cost.min() for cost in costs)
    return [cost - cost.min() for cost in costs], max(room, 0.0)


def _divisor(extras: list[Floats]) -> float:
    """The greatest common divisor of whole numbers, 0 for other numbers."""
    if not all(float(value).is_integer() for extra in extras for value in extra):
        return 0.0
    return float(math.gcd(*(int(value) for extra in extras for value in extra)))


def _units(extra_C: Floats, unit: float) -> NDArray[np.int64]:
    if not unit:
        return (extra_C > 0).astype(np.int64)
    return np.ceil(extra_C / unit * (1 - ROUNDING)).astype(np.int64)


def _best(loss_GC: Floats, units: list[NDArray[np.int64]], cells: int) -> Indices:
    """The places of the choices with the smallest total loss that spend at most `cells` units."""
    best_S = np.zeros(cells + 1)  # best_S[s]: smallest loss when at most s units are spent
    taken = np.zeros((len(units), cells + 1), dtype=np.uint16)
    for g, units_C in enumerate(units):
        new_S = np.full(cells + 1, np.inf)
        for c, spent in enumerate(units_C):
            if spent > cells:
                continue
            here = best_S[:cells + 1 - spent] + loss_GC[g, c]
            better = here < new_S[spent:]
            new_S[spent:][better] = here[better]
            taken[g, spent:][better] = c
        best_S = new_S
    return _trace(taken, units, cells)


def _trace(taken: NDArray[np.uint16], units: list[NDArray[np.int64]], cells: int) -> Indices:
    choice_G, left = np.zeros(len(units), dtype=np.intp), cells
    for g in reversed(range(len(units))):
        choice_G[g] = taken[g, left]
        left -= int(units[g][choice_G[g]])
    return choice_G
