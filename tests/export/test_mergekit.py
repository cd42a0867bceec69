"""mergekit carries out the recipe, where it is installed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from layerwise.allocate.plan import Edit, Plan
from layerwise.export.mergekit import Mergekit
from layerwise.export.source import Source
from layerwise.stack.open import open as open_stack
from layerwise.testing.stacks import random_stack


@pytest.mark.slow
def test_the_merged_model_is_the_one_without_the_layers(tmp_path: Path) -> None:
    pytest.importorskip("mergekit")
    stack = random_stack(5)
    stack.save(tmp_path / "whole")
    edits = tuple(Edit(layer, "drop", {"part": "layer"}) for layer in (1, 2))
    source = Source(plan=Plan(stack.spec.fingerprint(), 5, edits), original=stack.spec, origin=str(tmp_path / "whole"))
    recipe = Mergekit().write(source, tmp_path / "recipe.yaml").path
    subprocess.run([sys.executable, "-m", "mergekit.scripts.run_yaml", recipe, tmp_path / "merged"], check=True,
                   capture_output=True)
    slim = stack.rebuilt(stack.spec.with_rows({1: None, 2: None}), [stack.block(layer) for layer in (0, 3, 4)])
    tokens = torch.arange(12).view(2, 6)
    assert torch.equal(open_stack(tmp_path / "merged")(tokens), slim(tokens))
