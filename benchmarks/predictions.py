"""What single changes are predicted to lose beside what they lose: narrower layers and matrices of low rank.

    python -m benchmarks.predictions MODEL FOLDER [--layers 6,10]

The folder is that of `benchmarks.pareto`, whose measurements of layers are used again. Predictions are made twice: as
planning makes them, errors in a channel of the residual stream counting by what the output feels of it
(`layerwise.measure.sensitivity`), and with errors that count the same in all channels but for norms behind them.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from benchmarks.common import machine
from benchmarks.pareto import Bench
from layerwise.allocate.apply import apply
from layerwise.allocate.losses import Alternative, predict
from layerwise.allocate.plan import Edit, Plan
from layerwise.measure.engine import measure
from layerwise.measure.marginal import divergence
from layerwise.report.alternatives import parse_alternatives, reading
from layerwise.report.refine import shortened

MATRICES = ("q", "o", "down")


def changes(bench: Bench) -> Iterator[tuple[Alternative, str]]:
    """Every alternative with the matrix that it is about."""
    for item in parse_alternatives(["rank", "width"], bench.stack.spec):
        if item.transform == "narrow":
            yield item, "down" if "width" in item.arguments else "o"
        elif item.transform == "low-rank":
            yield from ((item, name) for name in MATRICES)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("model")
    options.add_argument("folder", type=Path)
    options.add_argument("--layers", default="", help="by default a quarter, half and three quarters up")
    given = options.parse_args()
    bench = Bench(given.model, given.folder)
    count = len(bench.stack)
    layers = [int(layer) for layer in given.layers.split(",") if layer] or [count // 4, count // 2, 3 * count // 4]
    trial, floor = shortened(bench.trial), bench.scores["response:floor"].values[0]
    items = list(changes(bench))
    alternatives = [item for item, _ in items]
    others = {name: column for name, column in bench.scores.columns.items() if not name.startswith("output-error:")}
    alike = replace(bench.scores, columns=others).merge(measure(bench.stack, bench.calibration, reading(alternatives)))
    both = [predict(scores, alternatives, None) for scores in (bench.scores, alike)]
    print(f"{machine()}; nats per token, of which rounding's {floor:.4f} are taken off what was measured\n")
    print(f"| layer | change | measured | predicted | the same in all channels |\n|{'---|' * 5}")
    for layer in layers:
        for item, name in items:
            only = () if item.transform == "narrow" else (name,)
            edit = Edit(layer, item.transform or "", item.given(only))
            slim = apply(bench.stack, Plan(bench.stack.spec.fingerprint(), count, (edit,)), bench.calibration)
            losses = " | ".join(f"{found.of_matrix(item, layer, name) if only else found.of(item, layer):.4f}"
                                for found in both)
            print(f"| {layer} | {item.label}{' of ' + name if only else ''} | "
                  f"{divergence(bench.stack, slim, trial) - floor:.4f} | {losses} |", flush=True)


if __name__ == "__main__":
    main()
