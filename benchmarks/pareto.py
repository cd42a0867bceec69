"""The joint plan beside every single currency, llama.cpp's mixtures and controls, at equal bytes on the same text.

    python -m benchmarks.pareto smollm2 build/pareto/smollm2 [--mixtures FOLDER] [--shares 60,45,35,30,25]

Every point is kept in the folder as soon as it is measured, and a run that was stopped goes on from there. All
methods round with the same quantizer (GPTQ on the same 16 blocks) and are compared with the original on text that
none of them has seen. A single currency may do what tools of that kind do today: one format for every matrix;
one width for each layer in one group size; whole layers left out; factors of low rank.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

import layerwise as lw
from benchmarks.common import machine
from layerwise.allocate.apply import apply
from layerwise.allocate.budget import Budget
from layerwise.allocate.choices import Groups, dropped, factors, keep, make_choices
from layerwise.allocate.cost import totals
from layerwise.allocate.losses import Alternative
from layerwise.allocate.plan import Plan
from layerwise.allocate.solve import allocate
from layerwise.allocate.solvers.base import Solver
from layerwise.allocate.solvers.milp import Milp
from layerwise.data.bootstrap import Interval, paired_interval, paired_ratio_interval
from layerwise.data.text import TextData, by_frequency
from layerwise.errors import BadBudget
from layerwise.io import atomic
from layerwise.measure.engine import measure
from layerwise.measure.output_error import OutputError
from layerwise.measure.scores import Scores
from layerwise.report.alternatives import CURRENCIES, defaults_for, parse_alternatives, reading, trying
from layerwise.report.decide import Decide
from layerwise.report.optimize import calibration_text, parted, sensitivity_for
from layerwise.report.refine import shortened
from layerwise.report.tried import try_plans
from layerwise.report.verify import compare_on, verification_text
from layerwise.stack.decoder import DecoderStack

SHARES = (60, 45, 35, 30, 25)
MIXTURES = ("Q3_K_M", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0")
RANKS = (0.8, 0.6, 0.4, 0.2, 0.1, 0.05)
Point = dict[str, Any]


class Bench:
    """One model with its text, scores and the points measured so far."""

    def __init__(self, name: str, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        stack = lw.open(name)
        assert isinstance(stack, DecoderStack)
        self.stack, self.folder = stack, folder
        self.calibration, self.trial = parted(calibration_text(stack, "default", 0))
        self.text: TextData = verification_text(stack, "default")
        self.points: dict[str, Point] = json.loads(self._file.read_text()) if self._file.exists() else {}
        self.whole = parse_alternatives([word for word in CURRENCIES if word != "cache"], stack.spec)
        self.scores = self._scores()

    @property
    def _file(self) -> Path:
        return self.folder / "points.json"

    def _scores(self) -> Scores:
        path = self.folder / "scores.parquet"
        if path.exists():
            return Scores.load(path)
        began = time.monotonic()
        journal = self.folder / "measured.jsonl"
        tried = trying(self.whole, by_frequency(self.calibration, self.stack.spec.vocabulary))
        scores = measure(self.stack, shortened(self.trial), tried, resume=journal)
        middle = time.monotonic()
        (errors,) = reading(self.whole, sensitivity_for(self.stack, shortened(self.trial), self.whole))
        assert isinstance(errors, OutputError)
        scores = scores.merge(measure(self.stack, self.calibration, [replace(errors, ranks=RANKS)], resume=journal))
        self.seconds("trials", middle - began)
        self.seconds("statistics", time.monotonic() - middle)
        scores.save(path)
        return scores

    def seconds(self, what: str, value: float) -> None:
        print(f"{what}: {value:.0f} s", flush=True)
        self._keep(f"seconds {what}", {"seconds": value})

    def _keep(self, key: str, point: Point) -> None:
        self.points[key] = point
        atomic.write_text(self._file, json.dumps(self.points))

    def point(self, key: str, make: Callable[[], tuple[int, DecoderStack]]) -> None:
        """Measure what `make` gives, unless that was done; a budget that cannot be met leaves no point."""
        if key in self.points:
            return
        began = time.monotonic()
        try:
            size, slim = make()
        except BadBudget as error:
            print(f"{key}: {error.expected}", flush=True)
            return
        found = compare_on(self.stack, slim, self.text)
        self._keep(key, {
            "bytes": size, "seconds": time.monotonic() - began, "kl": found.kl_N.tolist(),
            "positions": found.positions_N.tolist(), "before": found.before.sum_N.tolist(),
            "after": found.after.sum_N.tolist(), "tokens": found.before.tokens_N.tolist()})
        spent = time.monotonic() - began
        print(f"{key}: {size / 1e6:.1f} MB, KL {kl_of(self.points[key]):.4f}, {spent:.0f} s", flush=True)

    def carried_out(self, plan: Plan) -> tuple[int, DecoderStack]:
        slim = apply(self.stack, plan, self.calibration)
        return slim.spec.bytes(), slim

    def joint(self, budget: Budget, alternatives: list[Alternative] | None = None) -> tuple[int, DecoderStack]:
        """What `layerwise optimize` does."""
        offered = alternatives or defaults_for(budget, self.stack.spec)
        tried = try_plans(self.stack, self.scores, Decide(budget, offered), self.calibration, self.trial,
                          controls=False, tell=lambda words: print(f"  {words}", flush=True))
        for one in tried:
            print(f"  {one.name}: predicted {one.predicted:.4f}, measured {one.kl:.4f}", flush=True)
        best = next(one.plan for one in tried if one.kind == "plan")
        best.save(self.folder / f"plan-{budget}-{len(offered)}.json".replace(" ", "-"))
        return self.carried_out(best)

    def per_layer(self, budget: Budget, formats: list[Alternative]) -> tuple[int, DecoderStack]:
        """One of `formats` for all of a layer, chosen by the exact solver.

        Choices are made for each by itself, so that no mixture of others takes its place.
        """
        offered: Groups = []
        for item in formats:
            groups, _ = make_choices(self.scores, [keep(), item])
            whole = [[choice for choice in group if choice.label == item.label] for group in groups]
            kept = [[choice for choice in group if not choice.edits] for group in groups]
            offered = [before + more for before, more in zip(offered or kept, whole, strict=True)]
        spec = self.stack.spec
        picked = Milp().solve(offered, budget.limits(totals(spec)))
        edits = tuple(edit for choice in picked for edit in choice.edits)
        return self.carried_out(Plan(spec.fingerprint(), len(spec.rows), edits))

    def single(self, budget: Budget, alternatives: list[Alternative], solver: str | Solver = "milp"
               ) -> tuple[int, DecoderStack]:
        return self.carried_out(allocate(self.scores, budget, solver=solver, alternatives=alternatives))


def widest(bits: Sequence[Alternative]) -> list[Alternative]:
    """Of every width the format with the largest groups: what tools that choose a width for each layer offer."""
    found = {item.arguments["bits"]: item for item in bits if item.transform == "quantize"
             and ("row" not in item.label or item.label == "8/row=")}
    return list(found.values())


def kl_of(point: Point) -> float:
    return float(np.sum(point["kl"]) / np.sum(point["positions"]))


def rise(point: Point) -> tuple[float, str]:
    """Perplexity increase over the original in percent, and the same with its 95 % interval."""
    tokens = np.array(point["tokens"])
    found = paired_ratio_interval((np.array(point["before"]), tokens), (np.array(point["after"]), tokens))
    value, low, high = (100 * math.expm1(number) for number in (found.value, found.low, found.high))
    return value, f"{value:+.2f} % [{low:+.2f}, {high:+.2f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--mixtures", type=Path)
    parser.add_argument("--names", default=",".join(MIXTURES), help="mixtures to compare with")
    parser.add_argument("--shares", default=",".join(map(str, SHARES)))
    parser.add_argument("--only", default="")
    given = parser.parse_args()
    bench = Bench(given.model, given.folder)
    shares = [int(share) for share in given.shares.split(",")]
    wanted = given.only.split(",") if given.only else None
    for share in shares:
        for name, make in methods(bench, Budget(bytes=share / 100)).items():
            if wanted is None or name in wanted:
                bench.point(f"{share} {name}", make)
    if given.mixtures:
        compare_with_mixtures(bench, given.mixtures, given.names.split(","))
    page = report(bench, given.model, shares)
    atomic.write_text(given.folder / "report.md", page)
    print(page)


def methods(bench: Bench, budget: Budget) -> dict[str, Callable[[], tuple[int, DecoderStack]]]:
    spec = bench.stack.spec
    bits = parse_alternatives(["bits"], spec)
    plain = [item for item in bits if item.transform in (None, "quantize")]
    return {
        "joint": lambda: bench.joint(budget),
        "bits per matrix": lambda: bench.joint(budget, bits),
        "bits per layer": lambda: bench.per_layer(budget, widest(bits)),
        "uniform bits": lambda: bench.single(budget, plain, "uniform"),
        "depth": lambda: bench.single(budget, [keep(), dropped()]),
        "rank": lambda: bench.single(budget, [keep(), *factors(RANKS)]),
        "shuffled": lambda: bench.single(budget, defaults_for(budget, spec), "shuffled"),
        "reversed": lambda: bench.single(budget, defaults_for(budget, spec), "reversed"),
    }


def compare_with_mixtures(bench: Bench, folder: Path, names: Sequence[str]) -> None:
    """llama.cpp's mixtures, and the joint plan at the size of each."""
    from benchmarks.peers.llamacpp import llamacpp_mixtures

    for name, (size, opened) in llamacpp_mixtures(bench.stack, folder).items():
        if name not in names:
            continue
        bench.point(f"{name} llama.cpp", lambda size=size, opened=opened: (size, opened))
        bench.point(f"{name} joint", lambda size=size: bench.joint(Budget(bytes=size)))


def report(bench: Bench, model: str, shares: list[int]) -> str:
    """Everything measured so far, as Markdown."""
    points = bench.points
    names = list(methods(bench, Budget(bytes=0.5)))
    lines = [f"# The joint plan on {model}", "", f"`python -m benchmarks.pareto {model} FOLDER --mixtures FOLDER`, "
             f"{machine()}; {len(bench.text)} blocks of {bench.text.length} tokens that no method has seen.", "",
             "KL(original || result), nats per token:", "", f"| share of bytes | {' | '.join(names)} |",
             f"|{'---|' * (len(names) + 1)}"]
    for share in shares:
        cells = [f"{kl_of(points[f'{share} {name}']):.4f}" if f"{share} {name}" in points else "-" for name in names]
        lines.append(f"| {share} % | {' | '.join(cells)} |")
    lines += ["", "Perplexity increase over the original:", "", f"| share of bytes | {' | '.join(names)} |",
              f"|{'---|' * (len(names) + 1)}"]
    for share in shares:
        cells = [rise(points[f"{share} {name}"])[1] if f"{share} {name}" in points else "-" for name in names]
        lines.append(f"| {share} % | {' | '.join(cells)} |")
    lines += _beside(points, shares, "single currency", ("bits per layer", "uniform bits", "depth", "rank"))
    lines += _beside(points, shares, "control", ("shuffled", "reversed"))
    return "\n".join([*lines, *_mixtures(points), *_seconds(points)]) + "\n"


def _beside(points: dict[str, Point], shares: list[int], kind: str, names: Sequence[str]) -> list[str]:
    """The joint plan of every share beside each of the others that was measured, the nearest to the original first."""
    rows = []
    for share in shares:
        known = [f"{share} {name}" for name in names if {f"{share} {name}", f"{share} joint"} <= set(points)]
        rows += [_row(points, share, name) for name in sorted(known, key=lambda name: kl_of(points[name]))]
    return rows and ["", f"| share of bytes | {kind} | joint - that, 95 % | lower |", "|---|---|---|---|", *rows]


def _difference(joint: Point, other: Point) -> Interval:
    """How much nearer to the original the other one is, in nats per token, over blocks."""
    count = np.array(joint["positions"])
    return paired_interval(np.array(other["kl"]) / count, np.array(joint["kl"]) / count)


def _row(points: dict[str, Point], share: int, other: str) -> str:
    """The joint plan of a share beside another point."""
    found = _difference(points[f"{share} joint"], points[other])
    return (f"| {share} % | {other.partition(' ')[2]} {kl_of(points[other]):.4f} | {found.value:+.5f} "
            f"[{found.low:+.5f}, {found.high:+.5f}] | "
            f"{'yes' if found.high < 0 else 'within noise' if found.low < 0 else 'no'} |")


def _mixtures(points: dict[str, Point]) -> list[str]:
    known = [key.partition(" ")[0] for key in points if key.endswith(" llama.cpp") and
             f"{key.partition(' ')[0]} joint" in points]
    if not known:
        return []
    lines = ["", "Beside llama.cpp's mixtures (importance matrix from the same kind of text) at their own size; "
             "perplexity increase over the original:", "",
             "| mixture | MB | joint MB | llama.cpp | joint | ratio | KL llama.cpp | KL joint | joint - that, KL |",
             f"|{'---|' * 9}"]
    for name in known:
        theirs, ours = points[f"{name} llama.cpp"], points[f"{name} joint"]
        (value, said), (our_value, our_said), found = rise(theirs), rise(ours), _difference(ours, theirs)
        lines.append(f"| {name} | {theirs['bytes'] / 1e6:.1f} | {ours['bytes'] / 1e6:.1f} | {said} | {our_said} | "
                     f"{our_value / value:.2f} | {kl_of(theirs):.4f} | {kl_of(ours):.4f} | {found.value:+.5f} "
                     f"[{found.low:+.5f}, {found.high:+.5f}] |")
    return lines


def _seconds(points: dict[str, Point]) -> list[str]:
    spent = [f"{key.partition(' ')[2]} {point['seconds']:.0f} s" for key, point in points.items()
             if key.startswith("seconds")]
    spent += [f"{key} {point['seconds']:.0f} s" for key, point in points.items() if key.endswith(" joint")]
    return ["", f"Time: {', '.join(spent)} (with measuring on the text above)."]


if __name__ == "__main__":
    main()
