"""What a solver is: a rule that takes one choice from each group and stays under every limit."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

from layerwise.allocate.choices import Choice, Groups


class Solver(ABC):
    """Base of every solver; subclasses are frozen dataclasses whose fields are settings. A control that
    does not look at losses says so in `reads_losses`; it is offered every choice."""

    name: ClassVar[str]
    reads_losses: ClassVar[bool] = True

    @abstractmethod
    def solve(self, groups: Groups, limits: Mapping[str, float], seed: int = 0) -> list[Choice]:
        """One choice from each group, in the order of the groups, costing at most `limits` in total.

        The same arguments give the same choices. Raises BadBudget where the limits cannot be met, naming
        the smallest value that can be.
        """
