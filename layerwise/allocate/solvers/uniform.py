"""Control: the same alternative everywhere, the best that fits; a solver that reads losses must beat it.

An alternative that takes layers away cannot be everywhere, so it is given to as few layers as fit the
limits, spread evenly over depth; so is one that reads the keys of another layer. Embedding and head take the
same alternative, or where they lack it the one that loses least among those that keep at most the same share
of their cost.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from layerwise.allocate.choices import Choice, Groups
from layerwise.allocate.solvers.base import Solver
from layerwise.allocate.solvers.problem import ROUNDING, Floats, Indices, Problem


@dataclass(frozen=True)
class Uniform(Solver):
    """No settings."""

    name: ClassVar[str] = "uniform"
    reads_losses: ClassVar[bool] = False

    def choose(self, groups: Groups, limits: Mapping[str, float], seed: int = 0) -> list[Choice]:
        problem = Problem.of(groups, limits)
        labels = _shared_labels(problem)
        first_that_fit = [next((choice_G for choice_G in _plans(problem, label)
                                if problem.fits(choice_G) and problem.consistent(choice_G)), None) for label in labels]
        plans = [choice_G for choice_G in first_that_fit if choice_G is not None]
        if not plans:
            raise problem.refuse(self.name, problem.cheapest())
        everyone = np.arange(len(groups))
        return problem.pick(min(plans, key=lambda choice_G: problem.loss_GC[everyone, choice_G].sum()))


def _shared_labels(problem: Problem) -> list[str]:
    layers = [problem.groups[g] for g in problem.layers()]
    everywhere = [choice.label for choice in layers[0]
                  if all(choice.label in {other.label for other in group} for group in layers)]
    reading = [problem.groups[link.reader][c].label for link in problem.links for c in sorted(link.taking)]
    return list(dict.fromkeys([*everywhere, *reading]))


def _plans(problem: Problem, label: str) -> list[Indices]:
    """The plan with `label` everywhere; for one that removes layers, with ever more layers removed."""
    layers = problem.layers()
    having = [g for g in layers if any(choice.label == label for choice in problem.groups[g])]
    if len(having) < len(layers):
        best_G, spread = problem.best(), [_spread(layers, count) for count in range(1, len(layers))]
        label_G = np.array([_offered(problem, g, label) if g in having else best_G[g]
                            for g in range(len(best_G))], dtype=np.intp)
        return [_some(best_G, label_G, chosen) for chosen in spread if set(chosen) <= set(having)]
    places_G = np.array([_place(problem, g, label) for g in range(len(problem.groups))], dtype=np.intp)
    if any(c.edits and c.row is None for g in layers for c in [problem.groups[g][places_G[g]]]):
        return [_some(problem.best(), places_G, _spread(layers, count)) for count in range(1, len(layers))]
    return [places_G]


def _offered(problem: Problem, g: int, label: str) -> int:
    return [choice.label for choice in problem.groups[g]].index(label)


def _place(problem: Problem, g: int, label: str) -> int:
    group = problem.groups[g]
    labels = [choice.label for choice in group]
    if label in labels:
        return labels.index(label)
    if len(group) == 1:
        return 0
    first = problem.layers()[0]
    allowed = _share(problem, first)[[c.label for c in problem.groups[first]].index(label)]
    inside_C = _share(problem, g) <= allowed * (1 + ROUNDING)
    if not inside_C.any():
        return int(problem.cheapest()[g])
    return int(np.argmin(np.where(inside_C, problem.loss_GC[g], np.inf)))


def _share(problem: Problem, g: int) -> Floats:
    cost_C: Floats = problem.cost_KGC[:, g].sum(0)
    most = cost_C[np.isfinite(cost_C)].max()
    return cost_C / most if most else cost_C


def _spread(layers: list[int], count: int) -> list[int]:
    """`count` of the layers, evenly over depth and away from both ends."""
    return [layers[int((i + 0.5) * len(layers) / count)] for i in range(count)]


def _some(base_G: Indices, label_G: Indices, chosen: list[int]) -> Indices:
    choice_G = base_G.copy()
    choice_G[chosen] = label_G[chosen]
    return choice_G
