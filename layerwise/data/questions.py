"""The multiple-choice tasks known by name, and how their files are read."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from layerwise.data.sources import data_folder, documents
from layerwise.data.split import Split, check_split, divide
from layerwise.data.tasks import ChoiceItem, MultipleChoice
from layerwise.errors import BadData, BadFile

_SENTENCE = re.compile(r"(?<![A-Z]\.)(?<!e\.g\.)(?<!i\.e\.)(?<=[.!?])\s+(?=[A-Z])")
_PROSE = re.compile(r"[A-Z][^|=*<>{}]{40,300}[.!?]")


def piqa(path: str | Path | None = None) -> MultipleChoice:
    """Two-way questions on handling things: `valid.jsonl`, and `valid-labels.lst` beside it.

    `path` is the .jsonl file or its folder; without it, `piqa` in the folder LAYERWISE_DATA.
    Raises BadData if there is none, BadFile if it is damaged.
    """
    file = _find(path, "piqa", "valid.jsonl")
    rows = _rows(file)
    answers = file.parent / f"{file.stem}-labels.lst"
    if not answers.is_file():
        raise BadFile(
            f"no answers beside {file}", expected=f"{answers.name} in the same folder", do="put it there"
        )
    labels = answers.read_text().split()
    if len(labels) != len(rows):
        raise BadFile(
            f"{len(rows)} questions and {len(labels)} answers",
            expected="one answer a question",
            do=f"get {answers.name} that belongs to {file.name}",
        )

    def item(row: Any, label: str) -> ChoiceItem:
        return ChoiceItem(
            f"Question: {row['goal']}\nAnswer:", (f" {row['sol1']}", f" {row['sol2']}"), int(label)
        )

    return MultipleChoice(
        "piqa", _items(file, lambda: [item(*pair) for pair in zip(rows, labels, strict=True)]), str(file)
    )


def commonsense_qa(path: str | Path | None = None) -> MultipleChoice:
    """Five-way questions on everyday knowledge: `dev.jsonl`.

    `path` is the .jsonl file or its folder; without it, `commonsense-qa` in the folder LAYERWISE_DATA.
    Raises BadData if there is none, BadFile if it is damaged.
    """
    file = _find(path, "commonsense-qa", "dev.jsonl")

    def item(row: Any) -> ChoiceItem:
        choices = row["choices"]
        texts = tuple(f" {text}" for text in choices["text"])
        return ChoiceItem(
            f"Question: {row['question']}\nAnswer:", texts, choices["label"].index(row["answerKey"])
        )

    return MultipleChoice(
        "commonsense-qa", _items(file, lambda: [item(row) for row in _rows(file)]), str(file)
    )


def next_sentence(
    source: str | Path = "default", *, split: Split = "verification", options: int = 4, seed: int = 0
) -> MultipleChoice:
    """Which sentence comes next? The others are taken from elsewhere in the same split, of similar length.

    Needs no download with the default text. Every paragraph gives at most one item.
    Raises BadData if the text has too few paragraphs of two sentences.
    """
    draw = random.Random(seed)
    stretches = divide(documents(source))[check_split(split)]
    pairs = list(dict.fromkeys(pair for stretch in stretches for pair in _pairs(stretch)))
    if len(pairs) < options:
        raise BadData(
            f"{source} ({split} split) has {len(pairs)} usable paragraphs",
            expected=f"at least {options} paragraphs of two or more sentences",
            do="give more text",
        )
    items = []
    for context, true in pairs:
        near = sorted((abs(len(other) - len(true)), other) for _, other in pairs if other != true)
        others = draw.sample([other for _, other in near[: 8 * options]], min(options - 1, len(near)))
        answer = draw.randrange(len(others) + 1)
        texts = [*others[:answer], true, *others[answer:]]
        items.append(ChoiceItem(context, tuple(f" {text}" for text in texts), answer))
    return MultipleChoice("next-sentence", tuple(items), f"{source}, {split} split")


def _pairs(stretch: str) -> list[tuple[str, str]]:
    """(two sentences or one, the sentence that follows) of every paragraph of prose."""
    found = []
    for paragraph in re.split(r"\n\s*\n", stretch):
        sentences = _SENTENCE.split(" ".join(paragraph.split()))
        if len(sentences) >= 2 and all(_PROSE.fullmatch(sentence) for sentence in sentences[:3]):
            context, true = sentences[:2] if len(sentences) == 2 else (" ".join(sentences[:2]), sentences[2])
            found.append((context, true))
    return found


def _find(path: str | Path | None, folder: str, name: str) -> Path:
    root = data_folder()
    place = Path(path) if path is not None else root / folder if root else None
    file = place / name if place and place.is_dir() else place
    if file is None or not file.is_file():
        raise BadData(
            f"no {name} at {place or 'the folder LAYERWISE_DATA'}",
            expected=f"{folder}/{name}",
            do="give the path, set LAYERWISE_DATA, or use the task 'next-sentence'",
        )
    return file


def _rows(file: Path) -> list[Any]:
    try:
        return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line.strip()]
    except ValueError as error:
        raise BadFile(
            f"{file} is not JSON lines ({error})", expected="one JSON object a line", do="get the file anew"
        ) from error


def _items(file: Path, read: Callable[[], list[ChoiceItem]]) -> tuple[ChoiceItem, ...]:
    try:
        return tuple(read())
    except (KeyError, TypeError, ValueError) as error:
        raise BadFile(
            f"{file} has a question in another layout ({error!r})",
            expected="the published fields",
            do="get the file anew",
        ) from error
