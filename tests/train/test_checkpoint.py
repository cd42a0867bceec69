"""A training's state is there whole or as it was before, and belongs to one training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from layerwise.errors import BadFile, BadOption
from layerwise.io import atomic
from layerwise.train.checkpoint import Checkpoint, Saved, digest


def state(number: int) -> Saved:
    return Saved({"a": torch.full((2, 3), float(number)), "b": torch.tensor(number)}, {"steps": number})


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "state", "one")
    assert checkpoint.load() is None
    for number in (1, 2):
        checkpoint.save(state(number))
    found = Checkpoint(tmp_path / "state", "one").load()
    assert found is not None and found.values == {"steps": 2}
    assert torch.equal(found.tensors["a"], torch.full((2, 3), 2.0)) and found.tensors["b"].item() == 2
    assert sorted(path.name for path in (tmp_path / "state").iterdir()) == ["state-2", "state.json"]


def test_nothing_is_pickled(tmp_path: Path) -> None:
    Checkpoint(tmp_path, "one").save(state(1))
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {"state.json", "model.safetensors"}


def test_a_kill_before_the_last_rename_leaves_the_state_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint(tmp_path, "one")
    checkpoint.save(state(1))

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(atomic, "write_text", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(state(2))
    monkeypatch.undo()
    found = checkpoint.load()
    assert found is not None and found.values["steps"] == 1
    checkpoint.save(state(3))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["state-3", "state.json"]


def test_the_state_of_another_training_is_refused(tmp_path: Path) -> None:
    Checkpoint(tmp_path, "one").save(state(1))
    with pytest.raises(BadOption, match="another training"):
        Checkpoint(tmp_path, "two").load()


def test_a_damaged_state_is_refused(tmp_path: Path) -> None:
    Checkpoint(tmp_path, "one").save(state(1))
    (tmp_path / "state.json").write_text("{")
    with pytest.raises(BadFile, match=r"state\.json"):
        Checkpoint(tmp_path, "one").load()


def test_saving_is_due_after_a_while_and_not_again_at_once(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path, "one", every=0.0)
    assert checkpoint.due()
    later = Checkpoint(tmp_path, "one", every=100.0)
    assert not later.due()
    later.save(state(1))
    assert not later.due()
    later.remove()
    assert not tmp_path.exists()


def test_a_digest_depends_on_numbers_shapes_and_words() -> None:
    x = torch.arange(6)
    assert digest(x, "a") == digest(x.clone(), "a")
    assert len({digest(x, "a"), digest(x.view(2, 3), "a"), digest(x + 1, "a"), digest(x, "b")}) == 4
