"""A user's own model and data are found by name, and what is wrong with them is said in one error."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from layerwise.cli.imported import imported, names_code, open_model
from layerwise.errors import BadOption

CODE = """
import torch
from torch import nn
def build():
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Linear(4, 4) for _ in range(3)])
def stack():
    import layerwise
    return layerwise.open(build(), blocks=["0", "2"])
def batches():
    return [torch.arange(24.0).view(6, 4).sin()]
number = 3
def broken():
    raise RuntimeError("no weights")
"""


@pytest.fixture
def file(tmp_path: Path) -> str:
    (tmp_path / "mine.py").write_text(CODE)
    return str(tmp_path / "mine.py")


@pytest.mark.parametrize(("text", "expected"), [
    ("models.py:build", True), ("package.models:build", True), ("smollm2", False), ("hf:data:train", False),
    ("org/model", False), ("model.gguf", False), ("a/b:c d", False),
])
def test_what_means_code(text: str, expected: bool) -> None:
    assert names_code(text) is expected


def test_functions_are_called_and_models_opened(file: str) -> None:
    assert isinstance(imported(f"{file}:build"), nn.Sequential)
    assert imported(f"{file}:number") == 3
    assert len(open_model(f"{file}:build")) == 3 and len(open_model(f"{file}:stack")) == 2


@pytest.mark.parametrize(("name", "given"), [
    ("missing", "no attribute 'missing'"), ("broken", "no weights"), ("number", "makes a int"),
    ("batches", "makes a list"),
])
def test_what_is_wrong_is_said(file: str, name: str, given: str) -> None:
    with pytest.raises(BadOption, match=given):
        open_model(f"{file}:{name}")


def test_profile_of_a_users_module(file: str, tmp_path: Path, layerwise: Callable[..., Any]) -> None:
    ran = layerwise("profile", f"{file}:build", "--data", f"{file}:batches", "-o", "run")
    assert "cost:parameters" in ran.stdout and (tmp_path / "run" / "report.html").exists()
    without = layerwise("profile", f"{file}:build", check=False)
    assert without.returncode == 2 and "--data FILE.py:NAME" in without.stderr


def test_deep_profile_and_comparison_of_a_users_module(file: str, layerwise: Callable[..., Any]) -> None:
    ran = layerwise("profile", f"{file}:build", "--data", f"{file}:batches", "--deep", "-o", "run")
    assert "skip-effect" in ran.stdout and "leave-one-out" in ran.stderr and "labels" in ran.stderr
    assert "measuring: 3 layers" in ran.stderr and "trying: 3 layers by 1 instruments" in ran.stderr
    ran = layerwise("compare", f"{file}:build", f"{file}:build", "--data", f"{file}:batches", "--json")
    found = json.loads(ran.stdout)
    assert all(row[layer] > 0.999 for layer, row in enumerate(found["similarity"]))
    assert found["scores"][0] == found["scores"][1]
    assert not any(value for layer in found["drift"] for value in layer.values())


def test_modules_are_not_compared_without_data(file: str, layerwise: Callable[..., Any]) -> None:
    ran = layerwise("compare", f"{file}:build", f"{file}:build", check=False)
    assert ran.returncode == 2 and not ran.stdout and "--data FILE.py:NAME" in ran.stderr
