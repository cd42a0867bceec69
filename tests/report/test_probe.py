"""Speed and memory come from a fresh process, and are None with a reason where they cannot."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from layerwise.errors import BadFile
from layerwise.report import probe as probing
from layerwise.report.files import weight_bytes
from layerwise.stack import ModuleStack
from layerwise.testing.stacks import random_stack


def test_a_stack_without_a_folder_is_measured_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    stack = random_stack(2)
    found = probing.probe(stack)
    assert found.why is None
    assert found.decode_tokens_per_s and found.prefill_tokens_per_s
    assert found.peak_memory_bytes and found.peak_memory_bytes > 50e6
    assert stack.folder is None and not list(tmp_path.glob("layerwise-*"))


def test_memory_of_the_parent_is_not_counted() -> None:
    ballast = torch.ones(100_000_000)
    code = "from layerwise.report.probe import peak_memory; print(peak_memory())"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert probing.peak_memory() > ballast.nbytes
    assert int(child.stdout) < probing.peak_memory() - 0.5 * ballast.nbytes


def test_the_command_line_gives_one_object(tmp_path: Path) -> None:
    folder = random_stack(2).save(tmp_path / "model")
    command = [sys.executable, "-m", "layerwise.report.probe", str(folder), "--json", "--threads", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert set(json.loads(done.stdout)) == {
        "decode_tokens_per_s", "prefill_tokens_per_s", "peak_memory_bytes", "why",
    }  # fmt: skip


def test_a_model_that_does_not_open_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(BadFile, match="fresh process"):
        probing.probe_folder(tmp_path)


def test_a_module_is_not_measured_and_the_reason_is_given() -> None:
    module = torch.nn.Sequential(*[torch.nn.Linear(4, 4) for _ in range(3)])
    found = probing.probe(ModuleStack(module))
    assert found.peak_memory_bytes is None and found.why


def test_bytes_on_disk_are_those_of_the_table(tmp_path: Path) -> None:
    stack = random_stack(3, dtype="bfloat16")
    assert weight_bytes(stack.save(tmp_path / "model")) == stack.spec.bytes()
    assert weight_bytes(tmp_path) is None
