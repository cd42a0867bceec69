"""Run folders, saved models and plans as sources."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from layerwise.allocate.apply import apply
from layerwise.allocate.plan import Edit, Plan
from layerwise.errors import BadFile, BadOption
from layerwise.export.source import Source, kept
from layerwise.testing.stacks import random_stack

EDITS = (Edit(0, "quantize", {"bits": 8}), Edit(2, "drop", {"part": "layer"}),
         Edit(3, "drop", {"part": "attention"}))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run: the original beside it, its record, plan and model."""
    folder = tmp_path_factory.mktemp("export")
    stack = random_stack(4)
    stack.save(folder / "original")
    plan = Plan(stack.spec.fingerprint(), 4, EDITS)
    (folder / "run").mkdir()
    plan.save(folder / "run" / "plan.json")
    (folder / "run" / "run.json").write_text(json.dumps({"arguments": {"model": str(folder / "original")}}))
    apply(stack, plan).save(folder / "run" / "model")
    return folder / "run"


def test_a_run_knows_model_plan_and_origin(run: Path) -> None:
    source = Source.open(run)
    assert source.layers == (0, 1, 3) and source.name == "original"
    assert len(source.stack) == 3 and source.spec == source.stack.spec
    assert len(source.original.rows) == 4 and source.origin == str(run.parent / "original")


def test_a_model_with_a_plan_needs_no_weights(run: Path) -> None:
    source = Source.open(run.parent / "original", run / "plan.json")
    assert source.layers == (0, 1, 3)
    assert source.spec.rows == Source.open(run).spec.rows
    with pytest.raises(BadOption, match="has not been carried out"):
        _ = source.stack


def test_a_saved_model_is_its_own_source(run: Path) -> None:
    source = Source.open(run / "model")
    assert source.layers == (0, 1, 2) and len(source.stack) == 3
    with pytest.raises(BadOption, match="without its plan"):
        _ = source.original


def test_unfinished_runs_and_needless_plans_are_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(BadOption, match="and a plan"):
        Source.open(run, run / "plan.json")
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(BadFile, match=r"without plan\.json"):
        Source.open(tmp_path)


def test_what_is_kept() -> None:
    spec = random_stack(4).spec
    assert kept(Plan(spec.fingerprint(), 4, EDITS), spec) == (0, 1, 3)
    halves = tuple(Edit(1, "drop", {"part": part}) for part in ("attention", "feed_forward"))
    assert kept(Plan(spec.fingerprint(), 4, halves), spec) == (0, 2, 3)
