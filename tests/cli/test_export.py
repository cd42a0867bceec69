"""`layerwise export` as a user calls it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from layerwise.allocate.plan import Edit, Plan
from layerwise.stack.open import open

Command = Callable[..., Any]


@pytest.fixture
def run(layerwise: Command, model: Path, tmp_path: Path) -> Path:
    """A run folder with one quantized and one dropped layer."""
    edits = (Edit(0, "quantize", {"bits": 4}), Edit(2, "drop", {"part": "layer"}))
    folder = tmp_path / "run"
    folder.mkdir()
    Plan(open(model).spec.fingerprint(), 4, edits).save(folder / "plan.json")
    layerwise("apply", model, folder / "plan.json", "-o", folder / "model")
    (folder / "run.json").write_text(json.dumps({"arguments": {"model": str(model)}}))
    return folder


def test_a_run_becomes_a_gguf_file(layerwise: Command, run: Path) -> None:
    done = layerwise("export", run, "--to", "gguf", "--json")
    found = json.loads(done.stdout)
    assert found["to"] == "gguf" and Path(found["output"]) == run / "model.gguf"
    assert found["bytes"] == (run / "model.gguf").stat().st_size
    again, ours = open(run / "model.gguf"), open(run / "model")
    assert len(again) == 3 and again.spec.vocabulary == ours.spec.vocabulary
    assert again.tokenizer is not None


def test_a_refusal_names_what_to_allow(layerwise: Command, run: Path, tmp_path: Path) -> None:
    done = layerwise("export", run, "--to", "compressed-tensors", "-o", tmp_path / "out", check=False)
    assert done.returncode == 2 and "the matrix 'q' of layer 0" in done.stderr
    assert "do: allow --allow-requantize" in done.stderr and not (tmp_path / "out").exists()
    layerwise("export", run, "--to", "compressed-tensors", "-o", tmp_path / "out", "--allow-requantize")
    assert (tmp_path / "out" / "config.json").exists()


def test_rules_are_written_from_a_plan(layerwise: Command, run: Path, model: Path, tmp_path: Path) -> None:
    layerwise("export", model, "--plan", run / "plan.json", "--to", "llama.cpp-rules", "-o", tmp_path / "rules.txt")
    assert "--prune-layers 2" in (tmp_path / "rules.txt").read_text()
    done = layerwise("export", run, "--to", "mergekit", "--allow-dense")
    assert (run / "mergekit.yaml").exists() and "1 edits left out" in done.stdout


def test_an_unknown_target_is_refused(layerwise: Command, run: Path) -> None:
    assert "no export is called 'ggfu'" in layerwise("export", run, "--to", "ggfu", check=False).stderr
