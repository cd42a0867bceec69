"""Shares in proportion to importance, with a floor: the closed-form rule of many mixed-precision schemes.

    share[g] = clip(scale * importance[g], floor, 1) of what the group costs at most

The importance of a group is what it loses per unit saved at its cheapest choice. Each group takes its
dearest choice within its share; the scale is the largest, found by bisection, that meets the limits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from layerwise.allocate.choices import Choice, Groups
from layerwise.allocate.solvers.base import Solver
from layerwise.allocate.solvers.problem import ROUNDING, Floats, Indices, Problem

STEPS = 60
"""Halvings of the scale: enough to tell any two float shares apart."""


@dataclass(frozen=True)
class Proportional(Solver):
    """`floor` is the least share of its largest cost that a group gets (0.2 of 16 bits is about 3 bits)."""

    name: ClassVar[str] = "proportional"
    floor: float = 0.2

    def choose(self, groups: Groups, limits: Mapping[str, float], seed: int = 0) -> list[Choice]:
        problem = Problem.of(groups, limits)
        cost_GC = problem.cost_KGC.sum(0)
        importance_G = _importance(problem, cost_GC)
        low, high = 0.0, 1 / max(importance_G[importance_G > 0].min(initial=1.0), ROUNDING)
        if not problem.fits(floor_G := self._within(cost_GC, importance_G, low)):
            raise problem.refuse(self.name, floor_G)
        if problem.fits(all_G := self._within(cost_GC, importance_G, high)):
            return problem.pick(all_G)
        for _ in range(STEPS):
            middle = (low + high) / 2
            fits = problem.fits(self._within(cost_GC, importance_G, middle))
            low, high = (middle, high) if fits else (low, middle)
        return problem.pick(self._within(cost_GC, importance_G, low))

    def _within(self, cost_GC: Floats, importance_G: Floats, scale: float) -> Indices:
        """The dearest choice of each group within its share, or else the cheapest above the floor."""
        most_G = np.where(np.isfinite(cost_GC), cost_GC, 0).max(axis=1)
        share_G = np.clip(scale * importance_G, self.floor, 1) * most_G * (1 + ROUNDING)
        inside_GC = cost_GC <= share_G[:, None]
        dearest_G = np.argmax(np.where(inside_GC, cost_GC, -np.inf), axis=1)
        legal_GC = cost_GC >= (self.floor * most_G * (1 - ROUNDING))[:, None]
        least_G = np.argmin(np.where(legal_GC, cost_GC, np.inf), axis=1)
        dearest_is_legal_G = legal_GC[np.arange(len(cost_GC)), dearest_G] & inside_GC.any(axis=1)
        choice_G: Indices = np.where(dearest_is_legal_G, dearest_G, least_G)
        return choice_G


def _importance(problem: Problem, cost_GC: Floats) -> Floats:
    """From 0 to 1: loss at the cheapest choice per unit that it saves."""
    everyone, cheapest_G = np.arange(len(cost_GC)), np.argmin(cost_GC, axis=1)
    saved_G = np.where(np.isfinite(cost_GC), cost_GC, 0).max(axis=1) - cost_GC[everyone, cheapest_G]
    lost_G = np.maximum(problem.loss_GC[everyone, cheapest_G], 0)
    rate_G: Floats = np.divide(lost_G, saved_G, out=np.zeros_like(lost_G), where=saved_G > 0)
    return rate_G / (rate_G.max() or 1)
