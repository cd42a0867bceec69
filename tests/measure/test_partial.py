"""Parts measured by several processes add up to the whole, through files, exactly."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from layerwise.errors import BadFile, BadOption
from layerwise.measure.base import Forward, StateGradient
from layerwise.measure.engine import measure, names
from layerwise.measure.partial import Partial, merged, partial
from layerwise.measure.utilized_rank import UtilizedRank
from layerwise.stack.decoder import DecoderStack

WORK = """
import sys, torch, layerwise as lw
from layerwise.measure.partial import partial
tokens_NT = torch.randint(97, (5, 16), generator=torch.Generator().manual_seed(1))
first, last = map(int, sys.argv[2:4])
stack = lw.open(sys.argv[1])
partial(stack, tokens_NT[first:last], sys.argv[5:], progress=False).save(sys.argv[4])
"""


def test_two_processes_add_up_to_one(stack: DecoderStack, tokens_NT: Tensor, tmp_path: Path) -> None:
    wanted = [*names(Forward), *names(StateGradient)]
    stack.save(tmp_path / "model")
    ran = [subprocess.Popen([sys.executable, "-c", WORK, tmp_path / "model", str(first), str(last),
                             tmp_path / f"{first}.safetensors", *wanted]) for first, last in ((0, 2), (2, 5))]
    assert [process.wait() for process in ran] == [0, 0]
    found = merged([Partial.load(tmp_path / f"{first}.safetensors") for first in (0, 2)])
    whole = measure(stack, tokens_NT, wanted, batch=1, progress=False)
    assert list(found.columns) == list(whole.columns) and found.provenance["tokens"] == tokens_NT.numel()
    for name, column in whole.columns.items():
        assert found[name].values == pytest.approx(column.values, rel=1e-5, nan_ok=True), name


def test_a_file_gives_the_same_tally_back(stack: DecoderStack, tokens_NT: Tensor, tmp_path: Path) -> None:
    part = partial(stack, tokens_NT, [UtilizedRank(eps=0.05), "manifold", "lim"], progress=False)
    again = Partial.load(part.save(tmp_path / "part.safetensors"))
    assert again.instruments == part.instruments and again.samples == part.samples
    for name, column in merged([part]).columns.items():
        assert merged([again])[name].values == pytest.approx(column.values, rel=0, abs=0, nan_ok=True), name


def test_what_does_not_belong_together_is_refused(stack: DecoderStack, tokens_NT: Tensor) -> None:
    part = partial(stack, tokens_NT[:2], "lim", progress=False)
    with pytest.raises(BadOption, match="same data"):
        merged([part, part])
    with pytest.raises(BadOption, match="other models or instruments"):
        merged([part, partial(stack, tokens_NT[2:], "manifold", progress=False)])
    with pytest.raises(BadOption, match="at least one"):
        merged([])
    with pytest.raises(BadOption, match="'weight-l1'"):
        partial(stack, tokens_NT, ["lim", "weight-l1"], progress=False)


def test_a_damaged_or_foreign_file_is_refused(stack: DecoderStack, tokens_NT: Tensor, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = partial(stack, tokens_NT[:2], "lim", progress=False).save(tmp_path / "part.safetensors")
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(BadFile, match="partial results"):
        Partial.load(path)
    save_file({"x": torch.ones(1)}, path)
    with pytest.raises(BadFile, match="format"):
        Partial.load(path)
    with pytest.raises(BadFile):
        Partial.load(tmp_path / "none")
