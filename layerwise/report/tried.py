"""Plans that are carried out and measured, so that the chosen one stands beside others and controls."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from layerwise.allocate.apply import apply
from layerwise.allocate.plan import Plan
from layerwise.data.text import TextData
from layerwise.errors import BadBudget, BadFile, BadPlan
from layerwise.io import atomic
from layerwise.measure.marginal import divergence
from layerwise.measure.progress import Progress
from layerwise.measure.scores import Scores
from layerwise.report.decide import Decide
from layerwise.report.refine import refine
from layerwise.stack.decoder import DecoderStack

Kind = Literal["plan", "candidate", "control"]
SOLVER = "milp"
CONTROLS = ("random", "shuffled", "reversed")


@dataclass(frozen=True)
class Tried:
    """One plan as measured: stored bytes, and the divergence from the original in nats per token."""

    name: str
    kind: Kind
    bytes: int
    kl: float
    plan: Plan
    predicted: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values, the plan aside."""
        return {name: value for name, value in asdict(self).items() if name != "plan"}


def try_plans(
    stack: DecoderStack,
    scores: Scores,
    decide: Decide,
    calibration: TextData,
    trial: TextData,
    *,
    solver: str | None = None,
    controls: bool = True,
    tell: Callable[[str], None] = lambda _: None,
    progress: bool = False,
) -> list[Tried]:
    """Carry out plans and measure them on `trial`: rounds of refinement, the same for every layer, and controls.

    One is marked as the plan: the round nearest to the original, or the uniform plan where that comes nearer;
    with `solver` only its own rounds count. A plan that comes up twice is measured once.
    """
    name = solver or SOLVER
    rounds = refine(stack, scores, lambda found: decide(found, name), calibration, trial, seed=decide.seed, tell=tell,
                    progress=progress)
    found = [Tried(f"{name}, round {number}" if number > 1 else name, "candidate", one.bytes, one.measured, one.plan,
                   one.predicted) for number, one in enumerate(rounds, start=1)]
    others: list[tuple[str, Kind, Plan]] = []
    others += [("formats only", "candidate", plan) for plan in _formats_only(scores, decide, name)]
    others += _others(scores, decide, controls, "uniform" if solver is None else None)
    with Progress("trying other plans", len(others), progress) as bar:
        for other, kind, plan in others:
            same = next((point for point in found if point.plan.edits == plan.edits), None)
            point = same or _measured(stack, plan, calibration, trial, decide.seed)
            found.append(replace(point, name=other, kind=kind, plan=plan, predicted=plan.predicted["loss"]))
            bar.step()
    return chosen(found)


def chosen(tried: Sequence[Tried]) -> list[Tried]:
    """The same with the candidate measured nearest to the original marked as the plan."""
    winner = min((point for point in tried if point.kind == "candidate"), key=lambda point: point.kl)
    return [replace(point, kind="plan") if point is winner else point for point in tried]


def save_tried(tried: Sequence[Tried], path: Path) -> None:
    """Write measured plans as JSON."""
    points = [{**point.to_json(), "plan": point.plan.to_json()} for point in tried]
    atomic.write_text(path, json.dumps(points, indent=1) + "\n")


def load_tried(path: Path) -> list[Tried]:
    """Read what `save_tried` wrote. Raises BadFile where it is missing or damaged."""
    try:
        points = json.loads(path.read_text(encoding="utf-8"))
        return [Tried(**{**point, "plan": Plan.from_json(point["plan"])}) for point in points]
    except (OSError, ValueError, TypeError, KeyError, BadPlan) as error:
        raise BadFile(
            f"the plans tried in {path}: {error}", expected="a file written by this command", do="use --fresh"
        ) from error


def _formats_only(scores: Scores, decide: Decide, solver: str) -> Iterator[Plan]:
    """The plan without factors, narrower halves and dropped parts, where formats alone can meet the budget.

    How much those lose is predicted less well than what rounding loses, so a plan without them stands beside.
    """
    plain = [item for item in decide.alternatives if item.transform in (None, "quantize", "learn-rotation")]
    if len(plain) == len(decide.alternatives) or not any(item.transform for item in plain):
        return
    try:
        yield replace(decide, alternatives=plain)(scores, solver)
    except BadBudget:
        return


def _others(scores: Scores, decide: Decide, controls: bool, candidate: str | None) -> Iterator[tuple[str, Kind, Plan]]:
    """What other solvers make of the same scores and budget; one that cannot meet the budget is passed over."""
    kinds: dict[str, Kind] = {candidate: "candidate"} if candidate else {}
    for name, kind in (kinds | dict.fromkeys(CONTROLS if controls else (), "control")).items():
        try:
            yield name, kind, decide(scores, name)
        except BadBudget:
            continue


def _measured(stack: DecoderStack, plan: Plan, calibration: TextData, trial: TextData, seed: int) -> Tried:
    slim = apply(stack, plan, calibration)
    return Tried("", "candidate", slim.spec.bytes(), divergence(stack, slim, trial, seed=seed), plan)
