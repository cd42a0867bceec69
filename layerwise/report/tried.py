"""Plans that are carried out and measured, so that the chosen one stands beside others and controls."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from layerwise.allocate.apply import apply
from layerwise.allocate.plan import Plan
from layerwise.data.text import TextData
from layerwise.errors import BadBudget, BadFile
from layerwise.io import atomic
from layerwise.measure.progress import Progress
from layerwise.measure.scores import Scores
from layerwise.report.decide import Decide
from layerwise.report.verify import compare_on
from layerwise.stack.base import Stack

Kind = Literal["plan", "candidate", "control"]
CANDIDATES = ("milp", "greedy", "uniform")
CONTROLS = ("random", "shuffled", "reversed")


@dataclass(frozen=True)
class Tried:
    """One plan as measured: stored bytes, and the divergence from the original in nats per token."""

    name: str
    kind: Kind
    bytes: int
    kl: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def try_plans(
    stack: Stack, plans: Sequence[tuple[str, Kind, Plan]], data: TextData, *, progress: bool = False
) -> list[Tried]:
    """Carry out every plan and compare the result with `stack` on `data`; equal plans are measured once."""
    measured: dict[str, Tried] = {}
    found = []
    with Progress("trying plans", len(plans), progress) as bar:
        for name, kind, plan in plans:
            key = json.dumps([vars(edit) | {"predicted_loss": None} for edit in plan.edits], sort_keys=True)
            if key not in measured:
                measured[key] = _measured(stack, plan, data)
            found.append(Tried(name, kind, measured[key].bytes, measured[key].kl))
            bar.step()
    return found


def contenders(scores: Scores, decide: Decide, solver: str | None = None) -> Iterator[tuple[str, Kind, Plan]]:
    """What each candidate and each control makes of the same scores and budget, `solver` first where given.

    One that cannot meet the budget is passed over, unless it was asked for: a control need not be able to.
    """
    for name in dict.fromkeys((*([solver] if solver else []), *CANDIDATES, *CONTROLS)):
        kind: Kind = "control" if name in CONTROLS else "candidate"
        try:
            yield name, kind, decide(scores, name)
        except BadBudget:
            if name == solver:
                raise


def chosen(tried: Sequence[Tried], solver: str | None = None) -> list[Tried]:
    """The same with one marked as the plan: that of `solver`, else the candidate measured nearest to the original."""
    candidates = [point for point in tried if point.kind == "candidate"]
    winner = solver or min(candidates, key=lambda point: point.kl).name
    return [replace(point, kind="plan") if point.name == winner else point for point in tried]


def save_tried(tried: Sequence[Tried], path: Path) -> None:
    """Write measured plans as JSON."""
    atomic.write_text(path, json.dumps([point.to_json() for point in tried], indent=1) + "\n")


def load_tried(path: Path) -> list[Tried]:
    """Read what `save_tried` wrote. Raises BadFile where it is missing or damaged."""
    try:
        return [Tried(**point) for point in json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError) as error:
        raise BadFile(
            f"the plans tried in {path}: {error}", expected="a file written by this command", do="use --fresh"
        ) from error


def _measured(stack: Stack, plan: Plan, data: TextData) -> Tried:
    slim = apply(stack, plan, data)
    compared = compare_on(stack, slim, data)
    kl = float(compared.kl_N.sum() / compared.positions_N.sum())
    return Tried("", "candidate", slim.spec.bytes(), kl)
