"""Control: the reference solver's choices, dealt out so that the layer that mattered most gets what the least got.

A plan no worse than this one does not owe its quality to the scores. It has the size and the histogram of the
reference; a layer matters as much as its cheapest choice is predicted to lose. A layer unlike all others keeps
its choice. Where links forbid what was dealt, as few layers as possible get something else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from layerwise.allocate.choices import Choice, Groups
from layerwise.allocate.solvers.base import Solver
from layerwise.allocate.solvers.milp import Milp
from layerwise.allocate.solvers.problem import Problem
from layerwise.allocate.solvers.shuffled import allowed, equal_layers, moved


@dataclass(frozen=True)
class ReversedLosses(Solver):
    """`reference` is the solver whose choices are dealt out."""

    name: ClassVar[str] = "reversed"
    reference: Solver = field(default_factory=Milp)

    def solve(self, groups: Groups, limits: Mapping[str, float], seed: int = 0) -> list[Choice]:
        """Deals once, and changes what links forbid; dealing again would make another plan."""
        return allowed(self.choose(groups, limits, seed), groups, limits)

    def choose(self, groups: Groups, limits: Mapping[str, float], seed: int = 0) -> list[Choice]:
        picked = self.reference.solve(groups, limits, seed)
        problem = Problem.of(groups, limits)
        lost_G = [problem.loss_GC[g, c] for g, c in enumerate(problem.cheapest())]
        for alike in equal_layers(picked):
            ranked = sorted(alike, key=lambda g: (lost_G[g], g))
            dealt = [picked[g] for g in reversed(ranked)]
            for g, choice in zip(ranked, dealt, strict=True):
                picked[g] = moved(choice, groups[g])
        return picked
