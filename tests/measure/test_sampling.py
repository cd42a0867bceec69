"""Sampled positions, running means, the journal: small parts with promises of their own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from layerwise.errors import BadFile
from layerwise.measure.journal import Journal
from layerwise.measure.progress import Progress
from layerwise.measure.sample import predicted, real, sample
from layerwise.measure.tally import Means


def rows(tokens: torch.Tensor, mask: torch.Tensor | None, count: int, seed: int = 0) -> list[list[int]]:
    """Sampled columns of every row."""
    places = sample(tokens, real(tokens, mask), lambda _: count, seed)
    return [[int(p) % tokens.shape[1] for p in places if int(p) // tokens.shape[1] == row]
            for row in range(len(tokens))]


def test_a_sample_depends_on_the_row_alone() -> None:
    tokens = torch.randint(50, (6, 40), generator=torch.Generator().manual_seed(0))
    found = rows(tokens, None, 5)
    assert all(len(set(row)) == 5 and row == sorted(row) for row in found)
    assert rows(tokens.flip(0), None, 5) == found[::-1]
    assert rows(tokens[2:3], None, 5) == found[2:3]
    assert rows(tokens, None, 5, seed=1) != found
    shifted = torch.cat([torch.zeros(6, 3, dtype=torch.int64), tokens], 1)
    mask = torch.arange(43).expand(6, 43) >= 3
    assert rows(shifted, mask, 5) == [[place + 3 for place in row] for row in found]


def test_short_rows_are_taken_whole() -> None:
    tokens = torch.zeros(2, 4, dtype=torch.int64)
    mask = torch.tensor([[True, True, False, False], [True] * 4])
    assert rows(tokens, mask, 3)[0] == [0, 1]
    assert len(rows(tokens, mask, 3)[1]) == 3


def test_predicted_tokens_have_a_real_one_after_them() -> None:
    tokens = torch.zeros(2, 4, dtype=torch.int64)
    mask = torch.tensor([[True, True, False, False], [False, True, True, True]])
    assert predicted(tokens, mask).tolist() == [[True, False, False, False], [False, True, True, False]]
    assert predicted(tokens, None).tolist() == [[True, True, True, False]] * 2


def test_means_leave_out_padding_and_nan() -> None:
    means = Means.empty(["a"], 2)
    mask = torch.tensor([[True, True], [True, False]])
    means.add("a", 0, torch.tensor([[1.0, 2.0], [torch.nan, 9.0]]), mask)
    assert means.mean("a")[0] == 1.5
    assert means.mean("a")[1] != means.mean("a")[1]
    assert (means + means).mean("a")[0] == 1.5


def test_a_journal_keeps_values_exactly(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "trials.jsonl"
    values = {"a": 0.1 + 0.2, "b": float("inf"), "c": -1e-300}
    journal = Journal(path, {"model": 1})
    for key, value in values.items():
        journal[key] = value
    assert Journal(path, {"model": 1}).values == values
    assert Journal(path, {"model": 2}).values == {}


@pytest.mark.parametrize("kept", range(1, 60, 7))
def test_a_line_that_was_cut_off_is_ignored_and_written_again(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "trials.jsonl"
    first = Journal(path, 0)
    first["a"] = 1.0
    size = path.stat().st_size
    first["b"] = 2.0
    path.write_bytes(path.read_bytes()[:size + kept])
    second = Journal(path, 0)
    assert second.values in ({"a": 1.0}, {"a": 1.0, "b": 2.0})
    second["b"] = 2.0
    assert Journal(path, 0).values == {"a": 1.0, "b": 2.0}


def test_foreign_lines_are_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "trials.jsonl"
    path.write_text('not json\n[1]\n"x"\n' + json.dumps({"of": "other", "item": "a", "value": 3}) + "\n")
    journal = Journal(path, 0)
    assert "a" not in journal
    journal["a"] = 1.0
    assert path.read_text().startswith("not json\n")


def test_a_journal_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BadFile, match="finished measurements"):
        Journal(tmp_path / "file" / "trials.jsonl", 0)["a"] = 1.0
    with pytest.raises(BadFile, match="finished measurements"):
        Journal(tmp_path, 0)


def test_progress_stays_silent_when_quick_or_unwatched(capfd: pytest.CaptureFixture[str],
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    for patience in (2.0, -1.0):
        monkeypatch.setattr("layerwise.measure.progress.PATIENCE", patience)
        with Progress("measuring", 3) as progress:
            for _ in range(3):
                progress.step()
    assert capfd.readouterr() == ("", "")


def test_progress_in_a_file_is_a_line_now_and_then(capfd: pytest.CaptureFixture[str],
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("layerwise.measure.progress.PATIENCE", -1.0)
    monkeypatch.setattr("layerwise.measure.progress.LINES_EVERY", 0.0)
    for show in (False, True):
        with Progress("measuring", 4, show) as progress:
            progress.step()
    assert capfd.readouterr() == ("", "measuring: 25% after 0 min, about 0 min left\n")


def test_progress_appears_on_standard_error(capfd: pytest.CaptureFixture[str],
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("layerwise.measure.progress.PATIENCE", -1.0)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    with Progress("measuring", 2) as progress:
        progress.step()
        progress.step()
    out, err = capfd.readouterr()
    assert out == "" and "measuring" in err
