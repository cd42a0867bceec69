"""Control: the reference solver, told that the most important layer is the least important one.

For each alternative the layers exchange their predicted losses, the smallest against the largest. A plan
no worse than this one does not owe its quality to the scores.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

from layerwise.allocate.choices import Choice, Groups
from layerwise.allocate.solvers.base import Solver
from layerwise.allocate.solvers.milp import Milp


@dataclass(frozen=True)
class ReversedLosses(Solver):
    """`reference` is the solver that is misled."""

    name: ClassVar[str] = "reversed"
    reference: Solver = field(default_factory=Milp)

    def solve(self, groups: Groups, limits: Mapping[str, float], seed: int = 0) -> list[Choice]:
        picked = self.reference.solve(_mirrored(groups), limits, seed)
        return [next(choice for choice in group if choice.label == wrong.label)
                for group, wrong in zip(groups, picked, strict=True)]


def _mirrored(groups: Groups) -> Groups:
    layers = [group for group in groups if isinstance(group[0].target, int)]
    labels = dict.fromkeys(choice.label for group in layers for choice in group)
    losses = {label: _exchanged(layers, label) for label in labels}
    return [[replace(choice, loss=losses[choice.label].get(choice.target, choice.loss)) for choice in group]
            if isinstance(group[0].target, int) else group for group in groups]


def _exchanged(layers: Groups, label: str) -> dict[int | str, float]:
    """Losses of `label` by layer, the smallest given to the layer that had the largest."""
    found = [choice for group in layers for choice in group if choice.label == label]
    ranked = sorted(found, key=lambda choice: choice.loss)
    return {mine.target: theirs.loss for mine, theirs in zip(ranked, reversed(ranked), strict=True)}
