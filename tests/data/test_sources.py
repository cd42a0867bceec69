"""Text is found where it is said to be, or the error says what is there."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from layerwise.data import sources, text_blocks
from layerwise.data.sources import detokenized, documents
from layerwise.data.text import Tokenizer
from layerwise.errors import BadData, BadFile, MissingExtra


def test_file_folder_and_json_lines(tmp_path: Path) -> None:
    (tmp_path / "b.md").write_text("# second\n")
    (tmp_path / "a.txt").write_text("first\n\n\n")
    (tmp_path / "sub").mkdir()
    lines = [json.dumps({"text": "third\u2028line", "n": 1}), "", json.dumps({"text": "fourth"})]
    (tmp_path / "sub" / "c.jsonl").write_text("\n".join(lines))
    (tmp_path / "ignored.bin").write_bytes(b"\xff\xfe")
    assert list(documents(tmp_path)) == ["first\n\n", "# second\n\n", "third\u2028line\n\n", "fourth\n\n"]
    assert list(documents(str(tmp_path / "a.txt"))) == ["first\n\n"]


def test_another_field(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"question": "why?"}))
    assert list(documents(file, field="question")) == ["why?\n\n"]
    with pytest.raises(BadData, match=r"line 1, has no text field 'text'\n  expected: .*\['question'\]"):
        list(documents(file))


def test_reading_stops_at_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "READ_LIMIT", 25)
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(name * 20)
    assert list(documents(tmp_path)) == ["a" * 20 + "\n\n", "b" * 5 + "\n\n"]


def test_no_text(tmp_path: Path) -> None:
    with pytest.raises(BadData, match="no text at"):
        list(documents(tmp_path / "missing.txt"))
    with pytest.raises(BadData, match="holds no text files"):
        list(documents(tmp_path))
    (tmp_path / "empty.txt").write_text(" \n\n")
    with pytest.raises(BadData, match="holds no text"):
        list(documents(tmp_path))


def test_damaged_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"good \xff bad")
    with pytest.raises(BadFile, match="byte 5 is not UTF-8"):
        list(documents(tmp_path / "a.txt"))
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"text": ')
    with pytest.raises(BadFile, match="line 2, is not JSON"):
        list(documents(tmp_path / "a.jsonl"))


def test_wikitext_has_its_own_splits(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, byte_tokenizer: Tokenizer) -> None:
    (tmp_path / "wikitext-2").mkdir()
    (tmp_path / "wikitext-2" / "valid.txt").write_text(" = Title = \n the valid @-@ text .")
    (tmp_path / "wikitext-2" / "test.txt").write_text(" the test text of the set")
    monkeypatch.setenv("LAYERWISE_DATA", str(tmp_path))
    calibration = text_blocks("wikitext-2", byte_tokenizer, length=8, seed=None)
    assert bytes(calibration.tokens_NT.flatten().tolist()) == b" = Title = \n the valid @-@ text ."[:32]
    assert calibration.source.where.endswith("valid.txt")
    verification = text_blocks("wikitext-2", byte_tokenizer, length=8, split="verification")
    assert verification.source.where.endswith("test.txt")
    plain = text_blocks("wikitext-2-detokenized", byte_tokenizer, length=28, seed=None)
    assert bytes(plain.tokens_NT.flatten().tolist()) == b" = Title = \n the valid-text."


def test_wikitext_elsewhere(monkeypatch: pytest.MonkeyPatch, byte_tokenizer: Tokenizer) -> None:
    monkeypatch.delenv("LAYERWISE_DATA", raising=False)
    with pytest.raises(BadData, match="set LAYERWISE_DATA"):
        text_blocks("wikitext-2", byte_tokenizer)


def test_detokenized() -> None:
    text = 'It is a " big " 1 @,@ 000 @.@ 5 @-@ metre ( 3 ft ) thing , isn \'t it ? The cat \'s .'
    assert detokenized(text) == 'It is a "big" 1,000.5-metre (3 ft) thing, isn\'t it? The cat\'s.'


def test_data_set_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtra, match=r"layerwise\[datasets\]"):
        list(documents("hf:Salesforce/wikitext:train"))


def test_data_set_saved_in_a_folder(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="needs the extra 'datasets'")
    datasets.disable_progress_bars()
    rows = datasets.Dataset.from_dict({"text": ["one", "two"]})
    datasets.DatasetDict({"train": rows}).save_to_disk(tmp_path / "all")
    rows.save_to_disk(tmp_path / "one")
    assert list(documents(f"hf:{tmp_path / 'all'}:train")) == ["one\n\n", "two\n\n"]
    assert list(documents(f"hf:{tmp_path / 'one'}:train")) == ["one\n\n", "two\n\n"]
    with pytest.raises(BadData, match="could not be read"):
        list(documents(f"hf:{tmp_path / 'all'}:test"))
    with pytest.raises(BadData, match="names no split"):
        list(documents("hf:wikitext"))


@pytest.mark.parametrize(("name", "configuration"), [
    ("Salesforce/wikitext", None), ("Salesforce/wikitext/wikitext-2-raw-v1", "wikitext-2-raw-v1")])
def test_data_set_on_the_hub_is_streamed(
        name: str, configuration: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(*args: object, **options: object) -> list[dict[str, str]]:
        asked.append((args, options))
        return [{"text": "one"}, {"text": ""}, {"text": "two"}]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert list(documents(f"hf:{name}:train")) == ["one\n\n", "two\n\n"]
    assert asked == [(("Salesforce/wikitext", configuration), {"split": "train", "streaming": True})]
