"""Two levels: rank the layers, and move the least important down, one at a time, until the limits hold.

The rule of most depth pruning and of layer-wise quantization (arXiv 2406.17415): a layer's rank is the
predicted loss of its low level. What is not a layer has the high level where it is offered, and otherwise
the choice that loses least.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from layerwise.allocate.choices import Choice, Groups
from layerwise.allocate.solvers.base import Solver
from layerwise.allocate.solvers.problem import Indices, Problem


@dataclass(frozen=True)
class RankAndCut(Solver):
    """`high` and `low` are the labels of the two levels.

    None means, for each layer, the choice that loses least and the one that costs least.
    """

    name: ClassVar[str] = "rank-and-cut"
    high: str | None = None
    low: str | None = None

    def choose(self, groups: Groups, limits: Mapping[str, float], seed: int = 0) -> list[Choice]:
        problem = Problem.of(groups, limits)
        high_G = _level(problem, self.high, problem.best())
        low_G = _level(problem, self.low, problem.cheapest())
        choice_G = high_G.copy()
        for g in sorted(problem.layers(), key=lambda g: problem.loss_GC[g, low_G[g]]):
            if problem.fits(choice_G):
                break
            choice_G[g] = low_G[g]
        if not problem.fits(choice_G):
            raise problem.refuse(self.name, choice_G)
        return problem.pick(choice_G)


def _level(problem: Problem, label: str | None, otherwise: Indices) -> Indices:
    """The choice called `label` in each group that has it, and `otherwise` where it is None or missing."""
    if label is None:
        return otherwise
    places = [[choice.label for choice in group] for group in problem.groups]
    return np.array([labels.index(label) if label in labels else best
                     for labels, best in zip(places, problem.best(), strict=True)], dtype=np.intp)
