"""Memory of mapped files can be let go without changing a number."""

from __future__ import annotations

import platform
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from layerwise.io.pages import let_go, trim
from layerwise.io.safetensors import SafetensorsCheckpoint

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")


def resident(kind: str = "File") -> int:
    """Bytes in memory of mapped files, or of what was allocated ("Anon")."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"Rss{kind}"))


def test_files_are_let_go_and_read_again(tmp_path: Path) -> None:
    numbers = torch.randn(4_000_000)
    save_file({"numbers": numbers}, tmp_path / "model.safetensors")
    mapped = SafetensorsCheckpoint(tmp_path).tensors(["numbers"])["numbers"]
    assert torch.equal(mapped, numbers)
    before = resident()
    let_go([mapped])
    assert resident() < before - 8_000_000
    assert torch.equal(mapped, numbers)


def test_other_memory_is_left_alone() -> None:
    numbers = torch.randn(2_000_000)
    kept = numbers.clone()
    let_go([numbers, numbers[::2], torch.empty(0), torch.empty(3, device="meta")])
    assert torch.equal(numbers, kept)


def test_numbers_that_were_changed_in_memory_stay_changed(tmp_path: Path) -> None:
    save_file({"numbers": torch.zeros(100_000)}, tmp_path / "model.safetensors")
    mapped = SafetensorsCheckpoint(tmp_path).tensors(["numbers"])["numbers"]
    mapped[5] = 7.0
    let_go([mapped])
    assert mapped[5] == 7.0 and mapped.sum() == 7.0


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries cannot be asked")
def test_memory_that_was_freed_in_pieces_is_given_back() -> None:
    pieces = [torch.ones(20_000) for _ in range(3000)]
    kept, expected = pieces[::100], len(pieces) * 80_000
    full = resident("Anon")
    del pieces
    trim()
    assert resident("Anon") < full - expected // 2
    assert all(bool((piece == 1).all()) for piece in kept)
