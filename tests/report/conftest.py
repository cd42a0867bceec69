"""A report made of plain values, for everything that only shows it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from layerwise.data.bootstrap import Interval
from layerwise.measure.scores import Column, Scores
from layerwise.report.layers import layer_changes
from layerwise.report.report import Measurement, Report, TaskResult
from layerwise.spec import Attention, FeedForward, Format, LayerSpec, StackSpec

ROW = LayerSpec(Attention(9, 3, 64), FeedForward(1536))


@pytest.fixture(scope="session")
def before_spec() -> StackSpec:
    return StackSpec(family="llama", hidden=576, vocabulary=49152, rows=(ROW,) * 8)


@pytest.fixture(scope="session")
def after_spec(before_spec: StackSpec) -> StackSpec:
    """Layer 5 dropped, layer 6 without attention, the rest at mixed widths."""
    eight, four = Format(8, 32), Format(4, 32)
    all_eight = dict.fromkeys(ROW.matrices(576), eight)
    mixed = all_eight | dict.fromkeys(("gate", "up", "down"), four)
    rows = {layer: replace(ROW, formats=all_eight if layer < 3 else mixed) for layer in range(8)}
    rows[6] = replace(ROW, mixer=None, formats=dict.fromkeys(("gate", "up", "down"), four))
    return replace(before_spec.with_rows({**rows, 5: None}), embedding_format=eight)


@pytest.fixture(scope="session")
def report(before_spec: StackSpec, after_spec: StackSpec) -> Report:
    return Report(
        model="tiny <model> & co",
        before=Measurement(
            before_spec.bytes(), before_spec.parameters(), 37.12, 1070.0, 812_000_000, 12.31, (11.9, 12.8)
        ),
        after=Measurement(
            after_spec.bytes(),
            after_spec.parameters(),
            98.4,
            1200.0,
            None,
            12.4,
            (12.0, 12.9),
            ("peak memory is unknown: the process ended early",),
        ),
        log_perplexity_change=Interval(0.004, 0.0073, 0.0101),
        kl=Interval(0.011, 0.0123, 0.0139),
        agreement=Interval(0.92, 0.931, 0.94),
        layers=layer_changes(before_spec, after_spec, [0, 1, 2, 3, 4, 6, 7]),
        tasks={"piqa": TaskResult(0.67, 0.665, Interval(-0.02, -0.005, 0.01), 0.5)},
        notes=("a note </script><script>alert(1)</script>",),
        provenance={
            "seed": 0,
            "blocks": 32,
            "tokens per block": 512,
            "data": {"where": "default"},
            "versions": {"torch": "2.13.0"},
        },
    )


@pytest.fixture(scope="session")
def scores(before_spec: StackSpec) -> Scores:
    columns = [
        Column("block-influence", tuple(0.1 * layer for layer in range(8)), "1 - cosine", "high", "how far"),
        Column(
            "quantization-sensitivity:4",
            (0.5, float("nan"), *[0.1] * 6),
            "nats/token",
            "high",
            "at 4 bits",
            {"embedding": 0.7},
        ),
    ]
    return Scores(before_spec, {column.name: column for column in columns})


@pytest.fixture(scope="session")
def tried() -> list[dict[str, object]]:
    return [
        {"name": "milp", "kind": "plan", "bytes": 148e6, "kl": 0.0123},
        {"name": "greedy", "kind": "candidate", "bytes": 147e6, "kl": 0.0151},
        {"name": "uniform", "kind": "control", "bytes": 146e6, "kl": 0.021},
        {"name": "random 0", "kind": "control", "bytes": 147.9e6, "kl": 0.4},
        {"name": "reversed", "kind": "control", "bytes": 147.9e6, "kl": 1.3},
    ]
