"""Choice by evolution: a population of plans, of which the better ones are kept, crossed and changed.

Slower and less exact than the other solvers where losses add up, as they do here; it is the search of layer-wise
evolutionary pruning (Sieberling et al., EvoPress, 2024, arXiv 2410.14649), there for comparison and for
problems in which losses do not add up.

Shapes: P plans, G groups.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from layerwise.allocate.choices import Choice, Groups
from layerwise.allocate.solvers.base import Solver
from layerwise.allocate.solvers.greedy import refill
from layerwise.allocate.solvers.problem import ROUNDING, Indices, Problem


@dataclass(frozen=True)
class Evolution(Solver):
    """`population` plans live through `generations`; each child changes `changes` groups of one of the better half.

    A change that costs more is paid for by cheaper choices elsewhere, drawn at random, so that every plan fits.
    """

    name: ClassVar[str] = "evolution"
    population: int = 24
    generations: int = 150
    changes: int = 2

    def choose(self, groups: Groups, limits: Mapping[str, float], seed: int = 0) -> list[Choice]:
        problem = Problem.of(groups, limits)
        generator = np.random.default_rng(seed)
        start = problem.cheapest()
        if not problem.fits(start):
            raise problem.refuse(self.name, start)
        plans_PG = np.array([self._child(problem, start, generator, len(start)) for _ in range(self.population)])
        for _ in range(self.generations):
            plans_PG = plans_PG[np.argsort(_loss(problem, plans_PG), kind="stable")][: self.population // 2]
            children = [self._child(problem, plans_PG[generator.integers(len(plans_PG))], generator, self.changes)
                        for _ in range(self.population - len(plans_PG))]
            plans_PG = np.array([*plans_PG, *children])
        best = plans_PG[int(np.argmin(_loss(problem, plans_PG)))]
        return problem.pick(refill(problem, best))

    def _child(self, problem: Problem, plan_G: Indices, generator: np.random.Generator, changes: int) -> Indices:
        child_G = plan_G.copy()
        changed = generator.choice(len(child_G), size=min(changes, len(child_G)), replace=False)
        for g in changed:
            child_G[g] = generator.integers(len(problem.groups[g]))
        _pay(problem, child_G, generator)
        return child_G


def _pay(problem: Problem, plan_G: Indices, generator: np.random.Generator) -> None:
    """Make random groups cheaper, in place, until the plan fits."""
    spent_K = problem.spent(plan_G)
    cheapest_G = problem.cheapest()
    for g in generator.permutation(len(plan_G)):
        if (spent_K <= 1 + ROUNDING / 2).all():
            return
        cost_KC = problem.cost_KGC[:, g, : len(problem.groups[g])]
        now_K1 = cost_KC[:, plan_G[g], None]
        (cheaper,) = np.nonzero((cost_KC < now_K1).any(0) & (cost_KC <= now_K1).all(0))
        new = int(generator.choice(cheaper)) if len(cheaper) else int(cheapest_G[g])
        spent_K = spent_K + cost_KC[:, new] - cost_KC[:, plan_G[g]]
        plan_G[g] = new
    if not problem.fits(plan_G):
        plan_G[:] = cheapest_G


def _loss(problem: Problem, plans_PG: Indices) -> NDArray[np.float64]:
    losses: NDArray[np.float64] = problem.loss_GC[np.arange(plans_PG.shape[1]), plans_PG].sum(1)
    return losses
