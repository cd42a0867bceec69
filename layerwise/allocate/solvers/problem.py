"""The choices as arrays, which is all that most solvers look at.

Shapes: G groups, C choices of the largest group (missing ones cost and lose infinity), K limited currencies.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from layerwise.allocate.budget import show
from layerwise.allocate.choices import Choice, Groups
from layerwise.allocate.links import Link, links
from layerwise.errors import BadBudget

Floats = NDArray[np.float64]
Indices = NDArray[np.intp]
ROUNDING = 1e-12
"""Relative room for the rounding of float sums; whole bytes stay exact up to 10^12."""


@dataclass(frozen=True)
class Problem:
    """`loss_GC`; `cost_KGC` in units of its limit, so that every total must be at most 1."""

    groups: Groups
    limits: Mapping[str, float]
    loss_GC: Floats
    cost_KGC: Floats
    links: tuple[Link, ...] = ()

    @staticmethod
    def of(groups: Groups, limits: Mapping[str, float]) -> Problem:
        """The arrays of `groups`. Raises BadBudget where a limit alone cannot be met."""
        shape = len(groups), max(len(group) for group in groups)
        loss_GC = np.full(shape, np.inf)
        cost_KGC = np.full((len(limits), *shape), np.inf)
        for g, group in enumerate(groups):
            loss_GC[g, :len(group)] = [choice.loss for choice in group]
            for k, (currency, limit) in enumerate(limits.items()):
                cost_KGC[k, g, :len(group)] = [choice.cost[currency] / limit for choice in group]
        problem = Problem(groups, limits, loss_GC, cost_KGC, links(groups))
        problem._check_reachable()
        return problem

    def pick(self, choice_G: Indices) -> list[Choice]:
        """The choices with these places in their groups. They must fit."""
        assert self.fits(choice_G)
        return [group[c] for group, c in zip(self.groups, choice_G, strict=True)]

    def spent(self, choice_G: Indices) -> Floats:
        """Total cost [K], in units of the limits."""
        picked = [group[c] for group, c in zip(self.groups, choice_G, strict=True)]
        return np.array([math.fsum(choice.cost[currency] for choice in picked) / limit
                         for currency, limit in self.limits.items()])

    def fits(self, choice_G: Indices) -> bool:
        return bool((self.spent(choice_G) <= 1 + ROUNDING).all())

    def consistent(self, choice_G: Indices) -> bool:
        """Whether every choice finds what it needs of another."""
        return all(choice_G[link.reader] not in link.taking or choice_G[link.source] in link.giving
                   for link in self.links)

    def cheapest(self) -> Indices:
        """The choice of each group that costs least over all limited currencies together."""
        choice_G: Indices = np.argmin(self.cost_KGC.sum(0), axis=1)
        return choice_G

    def best(self) -> Indices:
        """The choice of each group that loses least."""
        choice_G: Indices = np.argmin(self.loss_GC, axis=1)
        return choice_G

    def layers(self) -> list[int]:
        """The places of the groups that are layers."""
        return [g for g, group in enumerate(self.groups) if isinstance(group[0].target, int)]

    def refuse(self, solver: str, choice_G: Indices) -> BadBudget:
        """The error of a solver whose smallest plan is `choice_G`, when that is still too large."""
        spent = zip(self.limits.items(), self.spent(choice_G), strict=True)
        reached = " with ".join(self._amount(currency, share * limit) for (currency, limit), share in spent)
        return BadBudget(f"{self._wanted()} for the solver {solver!r}", expected=f"at least {reached}",
                         do="raise the budget, offer it smaller alternatives, or use the solver 'milp'")

    def _check_reachable(self) -> None:
        for currency, limit in self.limits.items():
            least = math.fsum(min(choice.cost[currency] for choice in group) for group in self.groups)
            if least > limit * (1 + ROUNDING):
                raise self.unreachable({currency: self._least(currency) if self.links else least})

    def _least(self, currency: str) -> float:
        """The smallest total of one currency that links allow."""
        from layerwise.allocate.solvers.program import nearest

        k = list(self.limits).index(currency)
        alone = replace(self, limits={currency: self.limits[currency]}, cost_KGC=self.cost_KGC[k : k + 1])
        return nearest(alone)[currency]

    def unreachable(self, least: Mapping[str, float]) -> BadBudget:
        """The error for limits that cannot be met; `least` is what can be of one, or what is nearest of all."""
        if len(least) == 1:
            (currency, value), = least.items()
            return BadBudget(f"a budget of {show(currency, self.limits[currency])}",
                             expected=f"at least {self._amount(currency, value)}, the smallest these choices reach",
                             do="raise the budget, or allow smaller alternatives")
        nearest = " with ".join(self._amount(currency, value) for currency, value in least.items())
        return BadBudget(f"{self._wanted()}, which can be met alone but not together",
                         expected=f"for example {nearest}", do="raise one of the limits")

    def _wanted(self) -> str:
        limits = " with ".join(show(currency, limit) for currency, limit in self.limits.items())
        return f"a budget of {limits}"

    def _amount(self, currency: str, value: float) -> str:
        """A total rounded up, so that asking for what is printed succeeds; with its share of the original."""
        whole = math.ceil(value - 1e-6)
        exact = f"{whole:,} bytes" if currency == "bytes" else show(
            currency, whole if currency == "cache" else math.ceil(value * 1e3 - 1e-6) / 1e3)
        kept = [choice.cost[currency] for group in self.groups for choice in group if not choice.edits]
        if len(kept) < len(self.groups) or not sum(kept):
            return exact
        return f"{exact} ({math.ceil(1e3 * value / sum(kept) - 1e-9) / 10:.1f}% of the original)"
