"""Exact choice under several limits and with links between choices, as a mixed-integer linear program.

The program is in `program.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from layerwise.allocate.choices import Choice, Groups
from layerwise.allocate.solvers.base import Solver
from layerwise.allocate.solvers.problem import Indices, Problem
from layerwise.allocate.solvers.program import INFEASIBLE, STOPPED, minimise, nearest
from layerwise.errors import BadBudget

TIE = 1e-8
"""Of choices that lose the same the first in its group is taken; a share of the largest loss."""


@dataclass(frozen=True)
class Milp(Solver):
    """`gap` is the largest relative distance from the optimum; `nodes` bounds the search, repeatably.

    `seconds` is a last resort for problems of many thousand groups: a plan found at that moment may differ
    from run to run.
    """

    name: ClassVar[str] = "milp"
    gap: float = 1e-6
    nodes: int = 200_000
    seconds: float = 300.0

    def choose(self, groups: Groups, limits: Mapping[str, float], seed: int = 0) -> list[Choice]:
        problem = Problem.of(groups, limits)
        room = 1.0
        while True:
            choice_G = self._choose(problem, room)
            over = problem.spent(choice_G).max() - 1
            if problem.fits(choice_G):
                return problem.pick(choice_G)
            room -= 2 * over  # HiGHS allows a limit to be passed by a millionth

    def _choose(self, problem: Problem, room: float) -> Indices:
        largest = np.abs(problem.loss_GC[np.isfinite(problem.loss_GC)]).max() or 1.0
        scaled_GC = 1e3 * (problem.loss_GC / largest + TIE * np.arange(problem.loss_GC.shape[1]))
        choice_G, status = minimise(problem, scaled_GC, room, mip_rel_gap=self.gap, node_limit=self.nodes,
                                    time_limit=self.seconds)
        if choice_G is None:
            raise self._failure(status, problem)
        return choice_G

    def _failure(self, status: int, problem: Problem) -> BadBudget:
        if status == STOPPED:
            return BadBudget(f"no plan found within {self.nodes:,} nodes", expected="an easier budget",
                             do="raise nodes and seconds, or use the solver 'greedy'")
        assert status == INFEASIBLE, status
        return problem.unreachable(nearest(problem))
