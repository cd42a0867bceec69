"""The whole frontier: what is lost at every size, or at every share of another currency, predicted and measured.

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
from layerwise.allocate.cost import totals
from layerwise.allocate.plan import Plan
from layerwise.allocate.solve import allocate
from layerwise.allocate.stopwatch import clock_for
from layerwise.errors import BadBudget, BadFile, BadPlan
from layerwise.io import atomic
from layerwise.measure.identity import identity
from layerwise.measure.marginal import divergence
from layerwise.measure.scores import Scores
from layerwise.report.alternatives import calibrated, defaults_for, parse_alternatives
from layerwise.report.optimize import Tell, calibration_text, measured_for, opened, parted
from layerwise.report.refine import corrected, floor_of, undone
from layerwise.report.run import Run

SHARES = (0.6, 0.5, 0.4, 0.35, 0.3, 0.25)

UNITS = {"bytes": ("MB", 1e6), "bits": ("bits a parameter", 1.0), "parameters": ("M parameters", 1e6),
         "layers": ("layers", 1.0), "cache": ("kB of cache a token", 1e3), "milliseconds": ("ms a token", 1.0),
         "prefill": ("ms of prefill", 1.0)}
"""What a cost is written in, by currency, and how much of it is one."""


@dataclass(frozen=True)
class Point:
    """The plan for one share of a currency, and what it costs in that currency and in stored bytes.

    `predicted` and `measured` are what it was predicted to lose and what it lost, nats per token, the floor in both.
    """

    share: float
    cost: float
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
    of: str = "bytes",
    shares: Sequence[float] = SHARES,
    only: Sequence[str] = (),
    data: str | Path = "default",
    seed: int = 0,
    tell: Tell = lambda _: None,
    progress: bool = True,
) -> tuple[list[Point], float]:
    """A plan for every share of the original's cost, carried out and measured, and that cost; `run` resumes.

    `of` is the currency: "bytes", "cache", or another that `Budget` has. A share that cannot be reached is left out
    and said. Raises what opening, measuring and planning raise, and BadBudget where no share can be reached.
    """
    stack = opened(source, tell)
    run.note("model fingerprint", identity(stack))
    ordered = sorted(shares, reverse=True)
    hardest = Budget(**{of: min(ordered)})
    clock = clock_for(hardest, stack.spec)
    whole = totals(stack.spec, clock)[of]
    alternatives = parse_alternatives(only, stack.spec) or defaults_for(hardest, stack.spec, hard=clock is not None)
    calibration, trial = parted(calibration_text(stack, data, seed))
    alternatives = calibrated(alternatives, stack.spec, calibration.tokens_NT.numel(), only)
    scores = run.step(
        "scores",
        lambda: measured_for(stack, calibration, trial, alternatives, seed, run, tell, progress),
        file="scores.parquet",
        save=lambda scores, path: scores.save(path),
        load=Scores.load,
    )
    floor = floor_of(scores)

    def point(share: float, scores: Scores) -> tuple[Point, Scores]:
        plan = allocate(scores, Budget(**{of: share}), alternatives=alternatives, seed=seed, clock=clock)
        slim = apply(stack, plan, calibration)
        kl = divergence(stack, slim, trial, seed=seed)
        cost, (unit, scale) = plan.predicted[of], UNITS[of]
        tell(f"{share:.0%}: {cost / scale:.1f} {unit}, KL {kl:.4f} nats/token")
        found = Point(share, cost, slim.spec.bytes(), plan.predicted["loss"] + floor, kl, plan)
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
        raise BadBudget(f"shares {list(shares)} of the {of}", expected="at least one that can be reached",
                        do="ask for larger shares")
    return points, whole


def table(points: Sequence[Point], whole: float, of: str = "bytes") -> str:
    """One line for every size, for a terminal."""
    unit, scale = UNITS[of]
    width = max(9, len(unit) + 2)
    lines = [f"{'share':>6}{unit:>{width}}{'KL':>10}{'predicted':>11}  plan"]
    for point in points:
        numbers = f"{point.cost / scale:>{width}.1f}{point.measured:>10.4f}{point.predicted:>11.4f}"
        lines.append(f"{point.cost / whole:>6.1%}{numbers}  {point.plan.describe().partition(';')[0]}")
    return "\n".join(lines)


def _save(made: tuple[Point, Scores], path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    atomic.write_text(path, json.dumps({**made[0].to_json(), "scores": made[1].to_json()}))


def _load(path: Path) -> Point:
    return _read(path)[0]


def _load_scores(path: Path) -> Scores:
    return _read(path)[1]


def _read(path: Path) -> tuple[Point, Scores]:
    try:
        value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        scores = Scores.from_json(value.pop("scores"))
        return Point(**{**value, "plan": Plan.from_json(value["plan"])}), scores
    except (OSError, ValueError, KeyError, TypeError, BadPlan) as error:
        raise BadFile(f"the plan in {path}: {error}", expected="a file written by this command",
                      do="use --fresh") from error
