"""Control: the reference solver's choices, dealt out at random among equal layers.

The plan has the same size and the same histogram of choices as the reference, so what separates the two is
only which layer got what. A layer unlike all others keeps its choice. Where links forbid what was dealt, as few layers
as possible get something else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np

from layerwise.allocate.choices import Choice, Groups
from layerwise.allocate.links import consistent
from layerwise.allocate.solvers.base import Solver
from layerwise.allocate.solvers.milp import Milp


@dataclass(frozen=True)
class Shuffled(Solver):
    """`reference` is the solver whose choices are dealt out; `seed` decides how."""

    name: ClassVar[str] = "shuffled"
    reference: Solver = field(default_factory=Milp)

    def solve(self, groups: Groups, limits: Mapping[str, float], seed: int = 0) -> list[Choice]:
        """Deals once, and changes what links forbid; dealing again would make another plan."""
        return allowed(self.choose(groups, limits, seed), groups, limits)

    def choose(self, groups: Groups, limits: Mapping[str, float], seed: int = 0) -> list[Choice]:
        picked = self.reference.solve(groups, limits, seed)
        generator = np.random.default_rng(seed)
        for alike in equal_layers(picked):
            dealt = [picked[g] for g in generator.permutation(alike)]
            for g, choice in zip(alike, dealt, strict=True):
                picked[g] = moved(choice, groups[g])
        return picked


def allowed(picked: list[Choice], groups: Groups, limits: Mapping[str, float]) -> list[Choice]:
    """What was dealt, or the nearest plan in which every choice finds what it needs."""
    if consistent(picked):
        return picked
    from layerwise.allocate.solvers.program import mended

    return mended(groups, limits, picked, by_loss=False)[0]


def equal_layers(picked: Sequence[Choice]) -> list[list[int]]:
    """The places of layers that were equal before, so that any of them can get what another got."""
    kinds: dict[str, list[int]] = {}
    for g, choice in enumerate(picked):
        if isinstance(choice.target, int):
            kinds.setdefault(repr(choice.before), []).append(g)
    return list(kinds.values())


def moved(choice: Choice, group: Sequence[Choice]) -> Choice:
    """The same choice for the layer of `group`; where that is not offered, with the loss of where it comes from."""
    offered = [other for other in group if other.label == choice.label]
    if offered:
        return offered[0]
    target = group[0].target
    return replace(choice, target=target, edits=tuple(replace(edit, target=target) for edit in choice.edits))
