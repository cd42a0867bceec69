"""A model with state spaces in some of its rows goes through the main commands like any other."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from layerwise.measure.scores import Scores
from layerwise.spec import StateSpace
from layerwise.stack.open import open

Command = Callable[..., Any]
MATRICES = {"in_proj", "out_proj"}


def test_profile_has_a_column_of_every_matrix(layerwise: Command, hybrid: Path, tmp_path: Path) -> None:
    done = layerwise("profile", hybrid, "--only", "cost, block-influence, output-error, quantization-sensitivity",
                     "-o", "run", "--json")
    scores = Scores.load(tmp_path / json.loads(done.stdout.splitlines()[-1])["scores"])
    errors = scores["output-error:in_proj:4/64"].values
    assert errors[0] > 0 and errors[2] > 0 and not errors[1] > 0
    assert all(flops > 0 for flops in scores["cost:flops"].values)


@pytest.mark.slow
def test_optimize_packs_state_spaces(layerwise: Command, hybrid: Path, tmp_path: Path) -> None:
    layerwise("optimize", hybrid, "--bytes", "40%", "-o", "run", "--json")
    before, after = open(hybrid).spec, open(tmp_path / "run" / "model").spec
    assert after.bytes() <= 0.4 * before.bytes()
    spaces = [row for row in after.rows if isinstance(row.mixer, StateSpace)]
    assert spaces and any(MATRICES & {*row.formats, *row.ranks} for row in spaces)


def test_generate_continues_a_text(layerwise: Command, hybrid: Path) -> None:
    done = layerwise("generate", hybrid, "Hello", "-n", "4", "--raw")
    assert "4 tokens" in done.stderr and done.stdout.strip()


@pytest.mark.parametrize("target", ["gguf", "compressed-tensors", "torchao-rules", "llama.cpp-rules"])
def test_exports_that_cannot_hold_them_say_so(layerwise: Command, hybrid: Path, target: str) -> None:
    done = layerwise("export", hybrid, "--to", target, check=False)
    assert done.returncode and "Traceback" not in done.stderr
