"""The problem as an integer program, for what must be exact: choices by loss, and what is nearest within the limits.

    minimise   sum_g sum_c value[g, c] x[g, c]
    subject to sum_c x[g, c] = 1 for each group g,  sum cost_k[g, c] x[g, c] <= limit_k,  x in {0, 1}
               sum of x over what takes <= sum of x over what gives, for each link

Solved by HiGHS (Huangfu and Hall, 2018) through scipy.

Shapes: X variables, one for each choice of each group in turn; otherwise as in `problem.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from layerwise.allocate.choices import Choice, Groups
from layerwise.allocate.links import needs, settled
from layerwise.allocate.solvers.problem import Floats, Indices, Problem
from layerwise.io.silence import silent

STOPPED, INFEASIBLE = 1, 2
CLOSE = 0.01
"""Relative distance from the fewest changes at which mending stops."""


def minimise(problem: Problem, value_GC: Floats, room: float = 1.0, **options: Any) -> tuple[Indices | None, int]:
    """The places of the choices with the smallest total value within `room` of the limits, and HiGHS's status."""
    from scipy.optimize import Bounds, LinearConstraint

    real_GC = np.isfinite(problem.loss_GC)
    rules = [*_rules(problem, real_GC), LinearConstraint(problem.cost_KGC[:, real_GC], -np.inf, room)]
    found = _solved(value_GC[real_GC], constraints=rules, integrality=np.ones(int(real_GC.sum())), bounds=Bounds(0, 1),
                    options=options)
    return (None if found.x is None else _places(real_GC, found.x)), found.status


def nearest(problem: Problem) -> dict[str, float]:
    """Totals of the plan whose largest excess over a limit, as a share of it, is smallest."""
    from scipy.optimize import Bounds, LinearConstraint
    from scipy.sparse import csr_array, hstack

    real_GC = np.isfinite(problem.loss_GC)
    cost_KX = problem.cost_KGC[:, real_GC]
    count = cost_KX.shape[1]
    excess = np.hstack([cost_KX, np.full((len(cost_KX), 1), -1.0)])
    rules = [LinearConstraint(hstack([rule.A, csr_array((rule.A.shape[0], 1))]), rule.lb, rule.ub)
             for rule in _rules(problem, real_GC)]
    found = _solved(np.eye(count + 1)[-1], integrality=np.eye(count + 1)[-1] == 0,
                    constraints=[*rules, LinearConstraint(excess, -np.inf, 0)],
                    bounds=Bounds(0, np.r_[np.ones(count), np.inf]))
    spent_K = problem.spent(_places(real_GC, found.x[:-1]))
    return {name: share * limit for (name, limit), share in zip(problem.limits.items(), spent_K, strict=True)}


def _solved(value_X: Floats, **program: Any) -> Any:
    """What scipy's `milp` finds, without the line that HiGHS prints where it repairs a solution of its presolve."""
    from scipy.optimize import milp

    with silent():
        return milp(value_X, **program)


def mended(groups: Groups, limits: Mapping[str, float], picked: list[Choice], by_loss: bool
           ) -> tuple[list[Choice], Groups]:
    """The consistent plan within `limits` that differs from `picked` in the fewest groups, and what it leaves open.

    Of equally many changes those that lose least are made, where `by_loss` says so. The groups that come with it hold
    the choices that stay consistent while the same layers are read (see `links.settled`). Raises BadBudget where no
    plan is within the limits.
    """
    known = [group if choice in group or needs(choice) else [*group, choice]
             for group, choice in zip(groups, picked, strict=True)]
    problem = Problem.of(known, limits)
    changed_GC = np.ones(problem.loss_GC.shape)
    for g, (group, choice) in enumerate(zip(known, picked, strict=True)):
        if choice in group:
            changed_GC[g, group.index(choice)] = 0
    if by_loss:
        worst = np.abs(problem.loss_GC[np.isfinite(problem.loss_GC)]).max() or 1.0
        changed_GC += problem.loss_GC / (worst * len(known))
    places_G, _ = minimise(problem, changed_GC, 1 - 1e-6, mip_rel_gap=CLOSE)
    if places_G is None:
        places_G, _ = minimise(problem, changed_GC, mip_rel_gap=CLOSE)
    if places_G is None or not problem.fits(places_G):
        raise problem.unreachable(nearest(problem))
    return problem.pick(places_G), settled(known, problem.links, [int(c) for c in places_G])


def _places(real_GC: Any, x_X: Floats) -> Indices:
    x_GC = np.zeros(real_GC.shape)
    x_GC[real_GC] = x_X
    choice_G: Indices = np.argmax(x_GC, axis=1)
    return choice_G


def _rules(problem: Problem, real_GC: Any) -> list[Any]:
    """One choice from each group, and the links."""
    from scipy.optimize import LinearConstraint
    from scipy.sparse import csr_array

    group_X = np.nonzero(real_GC)[0]
    each = csr_array((np.ones(len(group_X)), (group_X, np.arange(len(group_X)))))
    rules = [LinearConstraint(each, 1, 1)]
    if problem.links:
        first_G = np.r_[0, np.cumsum(real_GC.sum(1))]
        cells = [(line, first_G[group] + c, sign) for line, link in enumerate(problem.links)
                 for group, choices, sign in ((link.reader, link.taking, 1.0), (link.source, link.giving, -1.0))
                 for c in choices]
        line, column, sign = zip(*cells, strict=True)
        shape = len(problem.links), len(group_X)
        rules.append(LinearConstraint(csr_array((sign, (line, column)), shape=shape), -np.inf, 0))
    return rules
