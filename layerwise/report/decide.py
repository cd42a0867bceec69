"""One planning question, asked of the chosen solver, of others, and before anything is measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from layerwise.allocate.budget import Budget
from layerwise.allocate.cost import Clock
from layerwise.allocate.losses import Alternative
from layerwise.allocate.plan import Plan
from layerwise.allocate.solve import allocate
from layerwise.measure.scores import Column, Scores
from layerwise.nets.decoder import MATRICES
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
        """Raises BadBudget where no plan can meet the budget; that follows from the table alone."""
        ones, outside = (1.0,) * len(spec.rows), {"embedding": 1.0, "head": 1.0}
        columns = {name: Column(name, ones, "nats/token", "high", "", outside) for name in self._columns()}
        self(Scores(spec, columns), "greedy")

    def _columns(self) -> list[str]:
        """Every column that planning may look for."""
        names = [f"response:{matrix}" for matrix in MATRICES] + [f"output-error:{m}:probe" for m in MATRICES]
        for alternative in self.alternatives:
            kind, _, setting = (alternative.measured or "").partition(":")
            if alternative.each:
                names += [f"response:{setting}", *(f"{kind}:{matrix}:{setting}" for matrix in MATRICES)]
            elif alternative.measured:
                names.append(alternative.measured)
        return names
