"""How much of what leaving layers out costs comes back by healing: SmolLM2 with 26 of its 30 layers.

    python -m benchmarks.heal FOLDER [--minutes 10]        # what `optimize smollm2 --layers 26 --heal 10m` does
    python -m benchmarks.heal FOLDER --controls 40         # ways to heal beside one another, 40 steps each
    python -m benchmarks.heal FOLDER --controls 40 --rate 1e-4

Every step is kept in the folder: a run that was killed goes on from there, in the middle of healing too. The plan reads
the first 18 blocks of the default text's calibration split, healing reads the others, and all models are compared on
24 blocks of its verification split, paired block by block.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

import layerwise as lw
from benchmarks.common import Row, machine, table
from layerwise.allocate.apply import apply
from layerwise.allocate.budget import Budget
from layerwise.allocate.plan import Plan
from layerwise.data.bootstrap import Interval, ratio_interval
from layerwise.data.text import TextData
from layerwise.io import atomic
from layerwise.report.alternatives import parse_alternatives
from layerwise.report.decide import Decide
from layerwise.report.heal import heal_in, load_healing, text_to_heal
from layerwise.report.layers import kept_layers
from layerwise.report.optimize import calibration_text, measured_for, parted
from layerwise.report.run import Run
from layerwise.report.tried import try_plans
from layerwise.report.verify import compare_on, verification_text
from layerwise.stack.decoder import DecoderStack
from layerwise.train.bridge import bridged
from layerwise.train.distill import Weights
from layerwise.train.duration import Duration
from layerwise.train.heal import BRIDGED, defaults, distil
from layerwise.train.methods import Layers, Lora, Method, Partial

LAYERS, MUST = 26, 0.5
Point = dict[str, Any]
WAYS: dict[str, tuple[Method, Weights]] = {
    "all layers, from the original": (Layers(), Weights()),
    "all layers, from the original's predictions alone": (Layers(), Weights(hidden=0.0)),
    "all layers, from the text alone": (Layers(), Weights(0.0, 0.0, 1.0)),
    "adapters (LoRA, rank 8), from the original": (Lora(), Weights()),
    "last 3 layers, from the original": (Partial(3, head=False), Weights()),
}


class Bench:
    """The original, the plan that leaves layers out, and the points measured so far."""

    def __init__(self, run: Run) -> None:
        stack = lw.open("smollm2")
        assert isinstance(stack, DecoderStack)
        self.stack, self.run = stack, run
        self.calibration, trial = parted(calibration_text(stack, "default", 0))
        self.text: TextData = verification_text(stack, "default")
        self.plan = run.step("plan", lambda: self._decided(trial), file="plan.json",
                             save=lambda plan, path: plan.save(path), load=Plan.load)
        self.dropped = apply(stack, self.plan, self.calibration)
        self.kept = kept_layers(stack.spec, self.plan)
        self._file = run.path("points.json")
        self.points: dict[str, Point] = json.loads(self._file.read_text()) if self._file.exists() else {}
        self.point("dropped", lambda: (self.dropped, {}))

    def _decided(self, trial: TextData) -> Plan:
        only = parse_alternatives(["drop"], self.stack.spec)
        scores = measured_for(self.stack, self.calibration, trial, only, 0, self.run, print, False)
        tried = try_plans(self.stack, scores, Decide(Budget(layers=LAYERS), only), self.calibration, trial,
                          controls=False, tell=print)
        return next(point.plan for point in tried if point.kind == "plan")

    def point(self, name: str, make: Callable[[], tuple[DecoderStack, Point]]) -> None:
        """Compare what `make` gives with the original, unless that was done."""
        if name not in self.points:
            model, more = make()
            found = compare_on(self.stack, model, self.text)
            self.points[name] = {**more, "before": found.before.sum_N.tolist(), "after": found.after.sum_N.tolist(),
                                 "tokens": found.before.tokens_N.tolist(), "kl": found.kl_N.tolist(),
                                 "positions": found.positions_N.tolist()}
            atomic.write_text(self._file, json.dumps(self.points))

    def healed(self, minutes: float) -> None:
        """As the command heals."""
        def make() -> tuple[DecoderStack, Point]:
            model = self.run.step("model", lambda: self.dropped, file="model", save=lambda slim, path: slim.save(path),
                                  load=lambda path: path)
            began = time.process_time()
            folder = heal_in(self.run, self.stack, model, self.plan, self.calibration, "default",
                             Duration(seconds=60 * minutes), 0, print)
            healing, model = load_healing(self.run.path("healing.json")), lw.open(folder)
            assert isinstance(model, DecoderStack)
            print(f"{time.process_time() - began:.0f} s of all cores together, by this process", flush=True)
            return model, {"steps": healing.steps, "minutes": healing.seconds / 60}

        self.point(f"healed, {minutes:g} minutes", make)

    def controls(self, steps: int, rate: float | None = None) -> None:
        """Every way to heal, for as many steps on the same blocks, at its own learning rate or at `rate`."""
        text, held = text_to_heal(self.stack, "default", self.calibration, 0)
        self.point("least squares alone", lambda: (
            bridged(self.dropped, self.stack, text.tokens_NT[:BRIDGED], self.kept)[0], {}))
        print(f"least squares alone: {self.share('least squares alone')}", flush=True)
        for way, (method, weights) in WAYS.items():
            def make(method: Method = method, weights: Weights = weights) -> tuple[DecoderStack, Point]:
                recipe = defaults(self.dropped, method, Duration(steps=steps))
                recipe = replace(recipe, learning_rate=rate or recipe.learning_rate)
                found = distil(self.dropped, self.stack, text.tokens_NT, held.tokens_NT, self.kept, method, recipe,
                               weights=weights)
                return found.stack, {"steps": steps, "helped": found.healing.helped}

            name = f"{way}, {steps} steps" + (f" at {rate:g}" if rate else "")
            self.point(name, make)
            print(f"{name}: {self.share(name)}", flush=True)

    def recovered(self, name: str) -> Interval:
        """The part of the lost log-perplexity that came back, with its 95 % interval over blocks."""
        whole, dropped, model = (np.array(part) for part in (
            self.points[name]["before"], self.points["dropped"]["after"], self.points[name]["after"]))
        return ratio_interval(dropped - model, dropped - whole)

    def share(self, name: str) -> str:
        found = self.recovered(name)
        return f"{found.value:.1%} [{found.low:.1%}, {found.high:.1%}]"

    def rows(self) -> list[Row]:
        """What was healed by the clock, against the half that must come back."""
        return [Row(f"part of the lost log-perplexity that comes back, {name}", self.share(name),
                    self.recovered(name).value, MUST, "more") for name in self.points if name.startswith("healed")]

    def table(self) -> str:
        """Perplexity, divergence and the part recovered, by point."""
        gone = ", ".join(map(str, sorted(set(range(len(self.stack))) - set(self.kept))))
        lines = [f"Left out: layers {gone}.\n", "| model | steps | perplexity | KL from the original | recovered |",
                 "|---|---|---|---|---|", f"| original | | {_perplexity(self.points['dropped'], 'before'):.3f} | | |"]
        for name, point in self.points.items():
            kl = sum(point["kl"]) / sum(point["positions"])
            share = "" if name == "dropped" else self.share(name)
            perplexity = _perplexity(point, "after")
            lines.append(f"| {name} | {point.get('steps', '')} | {perplexity:.3f} | {kl:.4f} | {share} |")
        return "\n".join(lines)


def _perplexity(point: Point, which: str) -> float:
    return float(np.exp(sum(point[which]) / sum(point["tokens"])))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--controls", type=int, default=0, metavar="STEPS")
    parser.add_argument("--rate", type=float, help="learning rate of the controls, instead of each way's own")
    given = parser.parse_args()
    print(machine())
    with Run.open(given.folder, "heal benchmark", {"layers": LAYERS}) as run:
        bench = Bench(run)
        bench.controls(given.controls, given.rate) if given.controls else bench.healed(given.minutes)
        print("\n\n".join([bench.table(), table(bench.rows())]))


if __name__ == "__main__":
    main()
