"""Exact choice under several limits, as a mixed-integer linear program.

    minimise   sum_g sum_c loss[g, c] x[g, c]
    subject to sum_c x[g, c] = 1 for each group g,  sum cost_k[g, c] x[g, c] <= limit_k,  x in {0, 1}

Solved by HiGHS (Huangfu and Hall, 2018) through scipy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from layerwise.allocate.choices import Choice, Groups
from layerwise.allocate.solvers.base import Solver
from layerwise.allocate.solvers.problem import Floats, Indices, Problem
from layerwise.errors import BadBudget

STOPPED, INFEASIBLE = 1, 2
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

    def solve(self, groups: Groups, limits: Mapping[str, float], seed: int = 0) -> list[Choice]:
        problem = Problem.of(groups, limits)
        room = 1.0
        while True:
            choice_G = self._solve(problem, room)
            over = problem.spent(choice_G).max() - 1
            if problem.fits(choice_G):
                return problem.pick(choice_G)
            room -= 2 * over  # HiGHS allows a limit to be passed by a millionth

    def _solve(self, problem: Problem, room: float) -> Indices:
        real_GC = np.isfinite(problem.loss_GC)
        loss_X = problem.loss_GC[real_GC]
        scaled_X = 1e3 * (loss_X / (np.abs(loss_X).max() or 1.0) + TIE * np.nonzero(real_GC)[1])
        cost_KX = problem.cost_KGC[:, real_GC]
        found = self._highs(scaled_X, real_GC, cost_KX, room)
        if found.x is None:
            raise self._failure(found.status, problem, real_GC, cost_KX)
        x_GC = np.zeros(real_GC.shape)
        x_GC[real_GC] = found.x
        choice_G: Indices = np.argmax(x_GC, axis=1)
        return choice_G

    def _highs(self, loss_X: Floats, real_GC: Any, cost_KX: Floats, room: float) -> Any:
        from scipy.optimize import Bounds, LinearConstraint, milp

        constraints = [LinearConstraint(_one_each(real_GC), 1, 1), LinearConstraint(cost_KX, -np.inf, room)]
        return milp(loss_X, constraints=constraints, integrality=np.ones(len(loss_X)), bounds=Bounds(0, 1),
                    options={"mip_rel_gap": self.gap, "node_limit": self.nodes, "time_limit": self.seconds})

    def _failure(self, status: int, problem: Problem, real_GC: Any, cost_KX: Floats) -> BadBudget:
        if status == STOPPED:
            return BadBudget(f"no plan found within {self.nodes:,} nodes", expected="an easier budget",
                             do="raise nodes and seconds, or use the solver 'greedy'")
        assert status == INFEASIBLE, status
        return problem.contradiction(_nearest(problem, real_GC, cost_KX))


def _one_each(real_GC: Any) -> Any:
    """Sparse [G, X]: which variables belong to which group."""
    from scipy.sparse import csr_array

    group_X = np.nonzero(real_GC)[0]
    return csr_array((np.ones(len(group_X)), (group_X, np.arange(len(group_X)))))


def _nearest(problem: Problem, real_GC: Any, cost_KX: Floats) -> dict[str, float]:
    """Totals of the plan whose largest excess, as a share of the limit, is smallest."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array, hstack

    count = cost_KX.shape[1]
    excess = np.hstack([cost_KX, np.full((len(cost_KX), 1), -1.0)])
    each = hstack([_one_each(real_GC), csr_array((len(real_GC), 1))])
    found = milp(np.eye(count + 1)[-1], integrality=np.eye(count + 1)[-1] == 0,
                 constraints=[LinearConstraint(each, 1, 1), LinearConstraint(excess, -np.inf, 0)],
                 bounds=Bounds(0, np.r_[np.ones(count), np.inf]))
    x_GC = np.zeros(real_GC.shape)
    x_GC[real_GC] = found.x[:-1]
    spent_K = problem.spent(np.argmax(x_GC, axis=1))
    return {name: share * limit for (name, limit), share in zip(problem.limits.items(), spent_K, strict=True)}
