"""Early stopping: it saves trials, says so, and never changes the plan."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from layerwise.allocate.budget import Budget
from layerwise.allocate.choices import dropped, keep, mixed
from layerwise.allocate.early import measure_early
from layerwise.allocate.plan import Plan
from layerwise.allocate.solve import allocate
from layerwise.data.text import Source, TextData
from layerwise.errors import BadOption
from layerwise.measure.engine import measure
from layerwise.measure.output_error import OutputError
from layerwise.measure.response import Response
from layerwise.measure.scores import Scores
from layerwise.stack.decoder import DecoderStack
from layerwise.testing.stacks import random_stack

LABELS = ("8/16", "4/16", "2/16")
RESPONSE = Response(tables=LABELS, tokens=16)
EVERYTHING = [keep(), *mixed(LABELS), dropped(), dropped("attention"), dropped("feed_forward")]


def text(blocks: int = 6, length: int = 24) -> TextData:
    tokens_NT = torch.randint(97, (blocks, length), generator=torch.Generator().manual_seed(1))
    return TextData(tokens_NT, "random", Source("random", None, "", tokens_NT.numel(), tuple(range(blocks))))


def deciding(stack: DecoderStack, budget: Budget) -> Callable[[Scores], Plan]:
    errors = measure(stack, text(), [OutputError(LABELS)], progress=False)
    return lambda scores: allocate(scores.merge(errors), budget, alternatives=EVERYTHING)


def test_without_blocks_to_spare_it_is_the_same_measurement() -> None:
    stack = random_stack(3)
    whole = measure(stack, text(), [RESPONSE], progress=False)
    early = measure_early(stack, text(), RESPONSE, deciding(stack, Budget(bytes=0.5)), blocks=6, progress=False)
    assert early.columns == whole.columns
    assert early.provenance == {**whole.provenance, "stopped": {}}


def never(decide: Callable[[Scores], Plan]) -> Callable[[Scores], Plan]:
    """The same plans, but said to lose so much that nothing is stopped."""
    return lambda scores: replace(decide(scores), predicted={"loss": math.inf})


@pytest.mark.parametrize(("share", "dtype"), [(0.6, "float32"), (0.2, "float32"), (0.35, "bfloat16")])
def test_the_plan_is_that_without_stopping(share: float, dtype: str) -> None:
    stack = random_stack(3, dtype=dtype)
    decide = deciding(stack, Budget(bytes=share))
    whole = measure_early(stack, text(), RESPONSE, never(decide), progress=False)
    early = measure_early(stack, text(), RESPONSE, decide, progress=False)
    plan = decide(early)
    assert plan.edits == decide(whole).edits
    assert whole.provenance["stopped"] == {}
    for key, note in early.provenance["stopped"].items():
        layer, part = key.split("/")
        assert note["plan"] < note["bound"] <= whole[f"response:{part}"].values[int(layer)]
        assert note["plan"] == plan.predicted["loss"]


def test_hopeless_parts_are_stopped_and_recorded(tmp_path: Path) -> None:
    stack = random_stack(3)
    decide = deciding(stack, Budget(bytes=0.7))
    early = measure_early(stack, text(), RESPONSE, decide, progress=False, resume=tmp_path / "trials.jsonl")
    stopped = early.provenance["stopped"]
    assert len(stopped) == 9  # a quarter of the loss of any part left out is more than 8 bits lose everywhere
    assert {(note["blocks"], note["of"]) for note in stopped.values()} == {(2, 6)}
    tried = [json.loads(line)["item"] for line in (tmp_path / "trials.jsonl").read_text().split("\n") if line]
    assert [tried.count(item) for item in ("0/drop", "0/q")] == [1, 2]
    assert "0/drop" in str(decide(early).provenance["merged"])
    again = measure_early(stack, text(), RESPONSE, decide, progress=False, resume=tmp_path / "trials.jsonl")
    assert again.columns == early.columns


def test_what_a_plan_wants_after_all_is_measured_to_the_end() -> None:
    """The plan looks good on the first blocks only; when it no longer does, what it ruled out is measured after all."""
    stack = random_stack(3)
    losses = iter([1e-9, 1e9, 1e9])

    def decide(scores: Scores) -> Plan:
        return Plan(scores.spec.fingerprint(), 3, (), predicted={"loss": next(losses)})

    early = measure_early(stack, text(), RESPONSE, decide, progress=False)
    whole = measure(stack, text(), [RESPONSE], progress=False)
    assert not list(losses)
    assert early.provenance["stopped"] == {}
    for name, column in whole.columns.items():
        assert early[name].values == pytest.approx(column.values, rel=1e-5, nan_ok=True)
        assert early[name].outside == pytest.approx(column.outside, rel=1e-5)


def test_a_single_block_shows_too_little() -> None:
    with pytest.raises(BadOption, match="at least 2"):
        measure_early(random_stack(3), text(), RESPONSE, lambda _: pytest.fail("not asked"), blocks=1)
