"""Control: a random plan that fills the budget without reading a loss.

Starts from the cheapest choice of every group and gives groups, in random order, a random dearer choice
that still fits, until none does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from layerwise.allocate.choices import Choice, Groups
from layerwise.allocate.solvers.base import Solver
from layerwise.allocate.solvers.problem import ROUNDING, Problem


@dataclass(frozen=True)
class RandomFill(Solver):
    """No settings; `seed` decides."""

    name: ClassVar[str] = "random"
    reads_losses: ClassVar[bool] = False

    def choose(self, groups: Groups, limits: Mapping[str, float], seed: int = 0) -> list[Choice]:
        problem = Problem.of(groups, limits)
        choice_G = problem.cheapest()
        if not problem.fits(choice_G):
            raise problem.refuse(self.name, choice_G)
        generator = np.random.default_rng(seed)
        cost_GC = problem.cost_KGC.sum(0)
        open_groups = set(range(len(groups)))
        while open_groups:
            for g in generator.permutation(sorted(open_groups)):
                room_K = 1 + ROUNDING / 2 - problem.spent(choice_G)
                change_KC = problem.cost_KGC[:, g] - problem.cost_KGC[:, g, choice_G[g], None]
                dearer_C = cost_GC[g] > cost_GC[g, choice_G[g]] + ROUNDING
                (fitting,) = np.nonzero(dearer_C & (change_KC <= room_K[:, None]).all(0))
                if len(fitting):
                    choice_G[g] = generator.choice(fitting)
                else:
                    open_groups.remove(int(g))
        return problem.pick(choice_G)
