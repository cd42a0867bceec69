"""`allocate`: from scores and a budget to a plan, in one call."""

from __future__ import annotations

import dataclasses
import math
import platform
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

from layerwise.allocate.budget import Budget
from layerwise.allocate.choices import Choice, Groups, make_choices
from layerwise.allocate.cost import Clock, totals
from layerwise.allocate.links import links, needs, offers
from layerwise.allocate.losses import Alternative, Losses
from layerwise.allocate.plan import Plan
from layerwise.allocate.solvers import SOLVERS
from layerwise.allocate.solvers.base import Solver
from layerwise.allocate.stopwatch import clock_for
from layerwise.measure.scores import Scores

NEGLIGIBLE = 0.1
"""Of what rounding in the model's own precision does, the share that all choices together may lose unpaid: a total as
large as rounding would double the divergence of a plan that has bytes to spare."""


def allocate(
    scores: Scores,
    budget: Budget,
    *,
    solver: str | Solver = "milp",
    alternatives: Sequence[Alternative] | None = None,
    by: str | Sequence[str] | None = None,
    seed: int = 0,
    clock: Clock | None = None,
) -> Plan:
    """The plan with the smallest predicted loss that stays within `budget`.

    Losses are measured ones where `scores` has them ("quantization-sensitivity", "leave-one-out"), and
    otherwise a surrogate from its importance columns, or from those named in `by`. `alternatives` limits
    what a layer may become; see `choices.defaults`. `clock` times layers for limits on decoding and prefill;
    the default measures them on this machine. Raises BadBudget, with the smallest reachable value, where the
    budget cannot be met; BadOption and UnknownName for scores that cannot be planned by.
    """
    solver = SOLVERS[solver]() if isinstance(solver, str) else solver
    clock = clock or clock_for(budget, scores.spec)
    limits = budget.limits(totals(scores.spec, clock))
    groups, losses = make_choices(scores, alternatives, by, clock, tuple(limits))
    groups = [_useful(group, tuple(limits)) for group in groups]
    if solver.reads_losses:
        share = NEGLIGIBLE / len(groups) if any(name.startswith("output-error:") for name in losses.columns) else 1.0
        as_keys = _alike_in_keys(groups)
        groups = [_worth_paying(group, share * losses.floor(group[0].target), tuple(limits), as_keys)
                  for group in groups]
    picked = solver.solve(groups, limits, seed)
    return _plan(scores, budget, limits, solver, seed, losses, picked)


def _useful(group: list[Choice], currencies: tuple[str, ...]) -> list[Choice]:
    """Without edits that save nothing in any limited currency."""
    kept = [choice for choice in group if not choice.edits]
    if not kept:
        return group
    return [choice for choice in group
            if not choice.edits or any(choice.cost[c] < kept[0].cost[c] for c in currencies)]


def _alike_in_keys(groups: Groups) -> Callable[[Choice, Choice], bool]:
    """Whether one choice can stand for another as far as other layers go: always where none reads another's keys."""
    if not links(groups):
        return lambda a, b: True
    keys = {id(choice): (needs(choice), offers(choice)) for group in groups for choice in group}
    return lambda a, b: keys[id(a)] == keys[id(b)]


def _worth_paying(group: list[Choice], floor: float, currencies: tuple[str, ...],
                  as_keys: Callable[[Choice, Choice], bool]) -> list[Choice]:
    """Without choices that cost more, in every limited currency, than one whose loss is lost in rounding.

    So a plan does not spend what is left of its budget on differences that nobody can measure. Losses predicted from
    output errors can be told apart far below the floor: there `floor` is a group's part of a tenth of it.
    """
    free = [choice for choice in group if choice.edits and choice.loss <= floor]
    return [choice for choice in group
            if not any(all(other.cost[c] < choice.cost[c] for c in currencies) and as_keys(other, choice)
                       for other in free)]


def _plan(scores: Scores, budget: Budget, limits: dict[str, float], solver: Solver, seed: int, losses: Losses,
          picked: list[Choice]) -> Plan:
    return Plan(
        table=scores.spec.fingerprint(), layers=len(scores.spec.rows), model=scores.model,
        edits=tuple(edit for choice in picked for edit in choice.edits),
        budget=budget.given(), limits=limits, solver=solver.name, settings=_settings(solver), seed=seed,
        predicted=predicted(picked), loss_unit=losses.unit, columns=losses.columns,
        provenance=scores.provenance, versions=_versions())


def predicted(picked: list[Choice]) -> dict[str, float]:
    """Total loss and total cost in each currency."""
    costs = {currency: math.fsum(choice.cost[currency] for choice in picked) for currency in picked[0].cost}
    whole = {currency: int(cost) if cost.is_integer() else cost for currency, cost in costs.items()}
    return {"loss": math.fsum(choice.loss for choice in picked)} | whole


def _settings(solver: Solver) -> dict[str, Any]:
    settings = {field.name: getattr(solver, field.name) for field in dataclasses.fields(solver)}  # type: ignore[arg-type]
    return {name: {"solver": value.name, **_settings(value)} if isinstance(value, Solver) else value
            for name, value in settings.items()}


def _versions() -> dict[str, str]:
    packages = {name: version(name) for name in ("numpy", "scipy", "torch")}
    return {"python": platform.python_version(), **packages}
