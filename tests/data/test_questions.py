"""Question files are read as published, and one task needs no file at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from layerwise.data import TASKS
from layerwise.data.questions import commonsense_qa, next_sentence, piqa
from layerwise.data.sources import documents
from layerwise.data.split import divide
from layerwise.errors import BadData, BadFile, BadOption

PIQA = [{"goal": "Open a jar.", "sol1": "twist", "sol2": "sing"},
        {"goal": "Dry hands.", "sol1": "dig", "sol2": "wipe"}]
CSQA = {"question": "Where is a bank?", "answerKey": "B",
        "choices": {"label": ["A", "B", "C"], "text": ["sky", "town", "sea"]}}


def write_piqa(folder: Path, labels: str = "0\n1\n") -> Path:
    (folder / "valid.jsonl").write_text("\n".join(map(json.dumps, PIQA)))
    (folder / "valid-labels.lst").write_text(labels)
    return folder


def test_piqa(tmp_path: Path) -> None:
    task = piqa(write_piqa(tmp_path))
    assert [item.answer for item in task.items] == [0, 1]
    assert task.items[0].prompt == "Question: Open a jar.\nAnswer:"
    assert task.items[0].options == (" twist", " sing")
    assert task.chance == 0.5


def test_commonsense_qa(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "commonsense-qa").mkdir()
    (tmp_path / "commonsense-qa" / "dev.jsonl").write_text(json.dumps(CSQA))
    monkeypatch.setenv("LAYERWISE_DATA", str(tmp_path))
    [item] = TASKS["commonsense-qa"]().items
    assert item.options[item.answer] == " town"


def test_next_sentence_is_true_unique_and_from_one_split() -> None:
    task = next_sentence()
    text = " ".join("".join(divide(documents("default"))["verification"]).split())
    assert len(task) > 80
    for item in task.items:
        assert item.prompt + item.options[item.answer] in text
        assert all(option.strip() in text for option in item.options)
        assert len(set(item.options)) == 4
    answers = [item.answer for item in task.items]
    assert min(answers.count(place) for place in range(4)) > 10
    assert len({item.prompt for item in task.items}) == len(task)


def test_next_sentence_follows_the_seed() -> None:
    assert next_sentence(seed=1) == next_sentence(seed=1)
    assert next_sentence(seed=1) != next_sentence(seed=2)


def test_damaged_files(tmp_path: Path) -> None:
    with pytest.raises(BadFile, match="2 questions and 1 answers"):
        piqa(write_piqa(tmp_path, "0\n"))
    (tmp_path / "valid-labels.lst").unlink()
    with pytest.raises(BadFile, match="no answers beside"):
        piqa(tmp_path)
    (tmp_path / "dev.jsonl").write_text('{"question": ')
    with pytest.raises(BadFile, match="not JSON lines"):
        commonsense_qa(tmp_path)
    (tmp_path / "dev.jsonl").write_text('{"question": "what?"}')
    with pytest.raises(BadFile, match="another layout"):
        commonsense_qa(tmp_path)


def test_missing_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LAYERWISE_DATA", raising=False)
    with pytest.raises(BadData, match="next-sentence"):
        piqa()
    with pytest.raises(BadData, match=r"no dev\.jsonl"):
        commonsense_qa(tmp_path)
    (tmp_path / "short.txt").write_text("Too short for questions.")
    with pytest.raises(BadData, match="0 usable paragraphs"):
        next_sentence(tmp_path / "short.txt")
    with pytest.raises(BadOption, match="split="):
        next_sentence(split="train")  # type: ignore[arg-type]
