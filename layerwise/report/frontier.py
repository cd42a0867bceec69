"""The whole frontier: what is lost at every size, predicted for many sizes and measured at some.

Sizes are taken from the largest to the smallest. Each measured plan corrects the predictions for the next (see
`refine.corrected`), so that a plan for a hard budget is not made from losses that were measured one at a time.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from layerwise.allocate.apply import apply
from layerwise.allocate.budget import Budget
from layerwise.allocate.plan import Plan
from layerwise.allocate.solve import allocate
from layerwise.errors import BadBudget, BadFile, BadPlan
from layerwise.io import atomic
from layerwise.measure.identity import identity
from layerwise.measure.marginal import divergence
from layerwise.measure.scores import Scores
from layerwise.report.alternatives import calibrated, defaults_for, parse_alternatives
from layerwise.report.optimize import Tell, calibration_text, measured_for, opened, parted
from layerwise.report.refine import corrected, undone
from layerwise.report.run import Run

SHARES = (0.6, 0.5, 0.4, 0.35, 0.3, 0.25)


@dataclass(frozen=True)
class Point:
    """The plan for one size: what it was predicted to lose and what it lost, nats per token, and the floor in both."""

    share: float
    bytes: int
    predicted: float
    measured: float
    plan: Plan

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**{name: value for name, value in asdict(self).items() if name != "plan"}, "plan": self.plan.to_json()}


def frontier(
    source: str | Path,
    run: Run,
    *,
    shares: Sequence[float] = SHARES,
    only: Sequence[str] = (),
    data: str | Path = "default",
    seed: int = 0,
    tell: Tell = lambda _: None,
    progress: bool = True,
) -> tuple[list[Point], int]:
    """A plan for every share of the original's bytes, carried out and measured, and those bytes; `run` resumes.

    A share that cannot be reached is left out and said. Raises what opening, measuring and planning raise, and
    BadBudget where no share can be reached.
    """
    stack = opened(source, tell)
    run.note("model fingerprint", identity(stack))
    ordered = sorted(shares, reverse=True)
    alternatives = parse_alternatives(only, stack.spec) or defaults_for(Budget(bytes=min(ordered)), stack.spec)
    calibration, trial = parted(calibration_text(stack, data, seed))
    alternatives = calibrated(alternatives, stack.spec, calibration.tokens_NT.numel(), only)
    scores = run.step(
        "scores",
        lambda: measured_for(stack, calibration, trial, alternatives, seed, run, tell, progress),
        file="scores.parquet",
        save=lambda scores, path: scores.save(path),
        load=Scores.load,
    )
    floor = scores["response:floor"].values[0] if "response:floor" in scores else 0.0

    def point(share: float, scores: Scores) -> tuple[Point, Scores]:
        plan = allocate(scores, Budget(bytes=share), alternatives=alternatives, seed=seed)
        slim = apply(stack, plan, calibration)
        kl = divergence(stack, slim, trial, seed=seed)
        tell(f"{share:.0%}: {slim.spec.bytes() / 1e6:.1f} MB, KL {kl:.4f} nats/token")
        found = Point(share, slim.spec.bytes(), plan.predicted["loss"] + floor, kl, plan)
        return found, corrected(scores, plan, undone(stack, slim, plan, trial, kl, seed, progress), floor)

    points: list[Point] = []
    for share in ordered:
        file = f"frontier/{share:g}.json"
        try:
            scores = run.step(
                f"plan for {share:g}",
                lambda share=share, scores=scores: point(share, scores),  # type: ignore[misc]
                file=file,
                save=_save,
                load=_load_scores,
            )
        except BadBudget as error:
            tell(f"{share:.0%} is left out: {error.expected}")
            continue
        points.append(_load(run.path(file)))
    if not points:
        raise BadBudget(f"shares {list(shares)} of the bytes", expected="at least one that can be reached",
                        do="ask for larger shares")
    return points, stack.spec.bytes()


def table(points: Sequence[Point], whole: int) -> str:
    """One line for every size, for a terminal."""
    lines = [f"{'share':>6}{'MB':>9}{'KL':>10}{'predicted':>11}  plan"]
    for point in points:
        numbers = f"{point.bytes / 1e6:>9.1f}{point.measured:>10.4f}{point.predicted:>11.4f}"
        lines.append(f"{point.bytes / whole:>6.1%}{numbers}  {point.plan.describe().partition(';')[0]}")
    return "\n".join(lines)


def _save(made: tuple[Point, Scores], path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    atomic.write_text(path, json.dumps({**made[0].to_json(), "scores": made[1].to_json()}))


def _load(path: Path) -> Point:
    value = _read(path)
    value.pop("scores")
    return Point(**{**value, "plan": Plan.from_json(value["plan"])})


def _load_scores(path: Path) -> Scores:
    return Scores.from_json(_read(path)["scores"])


def _read(path: Path) -> dict[str, Any]:
    try:
        value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        Plan.from_json(value["plan"])
    except (OSError, ValueError, KeyError, TypeError, BadPlan) as error:
        raise BadFile(f"the plan in {path}: {error}", expected="a file written by this command",
                      do="use --fresh") from error
    return value
