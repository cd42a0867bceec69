"""One planning question, asked of the chosen solver, of others, and before anything is measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from layerwise.allocate.budget import Budget
from layerwise.allocate.cost import Clock
from layerwise.allocate.losses import Alternative
from layerwise.allocate.plan import Plan
from layerwise.allocate.solve import allocate
from layerwise.errors import BadBudget
from layerwise.measure.scores import Column, Scores
from layerwise.nets.decoder import MATRICES
from layerwise.report.alternatives import defaults_for, parse_alternatives
from layerwise.spec import StackSpec


@dataclass(frozen=True)
class Decide:
    """`decide(scores, solver)` is the plan of that solver; all share budget, alternatives, seed and clock."""

    budget: Budget
    alternatives: Sequence[Alternative]
    seed: int = 0
    clock: Clock | None = None

    def __call__(self, scores: Scores, solver: str) -> Plan:
        return allocate(
            scores, self.budget, solver=solver, alternatives=self.alternatives, seed=self.seed, clock=self.clock
        )

    def check(self, spec: StackSpec) -> None:
        """Raises BadBudget where no plan can meet the budget; that follows from the table alone.

        Under several limits, or where choices depend on one another, the greedy solver may miss what can be met, so
        an exact one has the last word.
        """
        ones, outside = (1.0,) * len(spec.rows), {"embedding": 1.0, "head": 1.0}
        columns = {name: Column(name, ones, "nats/token", "high", "", outside) for name in self._columns()}
        try:
            self(Scores(spec, columns), "greedy")
        except BadBudget:
            self(Scores(spec, columns), "milp")

    def _columns(self) -> list[str]:
        """Every column that planning may look for."""
        names = [f"response:{matrix}" for matrix in MATRICES] + [f"output-error:{m}:probe" for m in MATRICES]
        for alternative in self.alternatives:
            kind, _, setting = (alternative.measured or "").partition(":")
            if alternative.each:
                names += [f"response:{setting}", *(f"{kind}:{matrix}:{setting}" for matrix in MATRICES)]
            elif alternative.measured:
                names += [alternative.measured, f"response:{setting}"]
        return names


def asked(budget: Budget, spec: StackSpec, only: Sequence[str], seed: int = 0, clock: Clock | None = None) -> Decide:
    """The question with what `only` allows; without it formats, and all else where they alone cannot meet the budget.

    Raises BadBudget where nothing can, BadOption for a word that means nothing.
    """
    decide = Decide(budget, parse_alternatives(only, spec) or defaults_for(budget, spec), seed, clock)
    try:
        decide.check(spec)
    except BadBudget:
        if only:
            raise
        decide = replace(decide, alternatives=defaults_for(budget, spec, hard=True))
        decide.check(spec)
    return decide
