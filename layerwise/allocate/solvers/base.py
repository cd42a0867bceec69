"""What a solver is: a rule that takes one choice from each group, under every limit and as links allow."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

from layerwise.allocate.choices import Choice, Groups
from layerwise.allocate.links import consistent
from layerwise.errors import BadBudget


class Solver(ABC):
    """Base of every solver; subclasses are frozen dataclasses whose fields are settings. A control that
    does not look at losses says so in `reads_losses`; it is offered every choice."""

    name: ClassVar[str]
    reads_losses: ClassVar[bool] = True

    def solve(self, groups: Groups, limits: Mapping[str, float], seed: int = 0) -> list[Choice]:
        """One choice from each group, in the order of the groups, costing at most `limits` in total and consistent
        (see `links.consistent`).

        Where `choose` takes choices that need others than it takes, as few as possible are changed. Which layers are
        read is settled by that, so that no choice depends on another any more, and the solver chooses again.
        The same arguments give the same choices. Raises BadBudget where the limits cannot be met, naming
        the smallest value that can be.
        """
        picked = self.choose(groups, limits, seed)
        if consistent(picked):
            return picked
        from layerwise.allocate.solvers.program import mended

        found, left = mended(groups, limits, picked, self.reads_losses)
        try:
            again = self.choose(left, limits, seed)
        except BadBudget:
            return found
        return again if consistent(again) else found

    @abstractmethod
    def choose(self, groups: Groups, limits: Mapping[str, float], seed: int = 0) -> list[Choice]:
        """As `solve`; links between choices may be left out of account."""
