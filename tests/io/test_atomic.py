"""Files and folders appear whole or not at all."""

from pathlib import Path

import pytest

from layerwise.errors import BadFile
from layerwise.io import atomic

DEAD = 2**22 + 1  # above the largest process id Linux hands out


def test_text_replaces_the_old_file_and_leaves_nothing_beside(tmp_path: Path) -> None:
    target = tmp_path / "plan.json"
    atomic.write_text(target, "one")
    atomic.write_text(target, "twö")
    assert target.read_text(encoding="utf-8") == "twö"
    assert list(tmp_path.iterdir()) == [target]


def test_a_failure_midway_keeps_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "plan.json"
    atomic.write_text(target, "old")
    with pytest.raises(BadFile, match="No space left"), atomic.file(target) as beside:
        beside.write_text("half")
        raise OSError(28, "No space left on device")
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with atomic.folder(target) as beside:
        (beside / "a").write_text("a")
    with atomic.folder(target) as beside:
        (beside / "inner").mkdir()
        (beside / "inner" / "b").write_text("b")
    assert [str(p.relative_to(target)) for p in sorted(target.rglob("*"))] == ["inner", "inner/b"]
    assert list(tmp_path.iterdir()) == [target]


def test_a_folder_that_fails_keeps_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with atomic.folder(target) as beside:
        (beside / "a").write_text("a")
    with pytest.raises(KeyError), atomic.folder(target) as beside:
        (beside / "b").write_text("b")
        raise KeyError("tensor")
    assert [p.name for p in target.iterdir()] == ["a"]
    assert list(tmp_path.iterdir()) == [target]


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / f".model.{DEAD}.partial").mkdir()
    (tmp_path / f".model.{DEAD}.partial" / "half").write_text("half")
    with atomic.folder(tmp_path / "model"):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_target_moved_away_by_a_killed_process_is_put_back(tmp_path: Path) -> None:
    (tmp_path / f".model.{DEAD}.old").mkdir()
    (tmp_path / f".model.{DEAD}.old" / "a").write_text("a")
    with pytest.raises(KeyError), atomic.folder(tmp_path / "model"):
        raise KeyError
    assert [p.name for p in (tmp_path / "model").iterdir()] == ["a"]
