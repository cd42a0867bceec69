"""Control: the reference solver's choices, dealt out at random among layers whose choices cost the same.

The plan has the same size and the same histogram of choices as the reference, so what separates the two is
only which layer got what. Layers whose costs are their own keep their choice.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from layerwise.allocate.choices import Choice, Groups
from layerwise.allocate.solvers.base import Solver
from layerwise.allocate.solvers.milp import Milp


@dataclass(frozen=True)
class Shuffled(Solver):
    """`reference` is the solver whose choices are dealt out; `seed` decides how."""

    name: ClassVar[str] = "shuffled"
    reference: Solver = field(default_factory=Milp)

    def solve(self, groups: Groups, limits: Mapping[str, float], seed: int = 0) -> list[Choice]:
        picked = self.reference.solve(groups, limits, seed)
        generator = np.random.default_rng(seed)
        for alike in _alike(groups, limits):
            labels = [picked[g].label for g in alike]
            for g, place in zip(alike, generator.permutation(len(alike)), strict=True):
                picked[g] = next(choice for choice in groups[g] if choice.label == labels[place])
        return picked


def _alike(groups: Groups, limits: Mapping[str, float]) -> list[list[int]]:
    """Layers that offer the same labels at the same costs."""
    kinds: dict[tuple[object, ...], list[int]] = defaultdict(list)
    for g, group in enumerate(groups):
        if isinstance(group[0].target, int):
            kinds[tuple((c.label, *(c.cost[currency] for currency in limits)) for c in group)].append(g)
    return list(kinds.values())
