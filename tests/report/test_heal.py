"""Healing in a run: which text it reads, and that a report tells of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from layerwise.allocate.plan import Edit, Plan
from layerwise.data.text import TextData, text_blocks
from layerwise.errors import BadData, BadFile
from layerwise.report.heal import heal_in, load_healing, save_healing, text_to_heal
from layerwise.report.report import Report
from layerwise.report.run import Run
from layerwise.report.words import summary
from layerwise.stack.decoder import DecoderStack
from layerwise.testing.stacks import random_stack
from layerwise.train.duration import Duration
from layerwise.train.healing import Healing

HEALING = Healing(120, 122_880, 600.4, 0.5912, 0.2134, True, 92_000_000)


class Letters:
    folder = None

    def encode(self, text: str) -> list[int]:
        return [ord(letter) % 97 for letter in text]


@pytest.fixture
def stack() -> DecoderStack:
    stack = random_stack(4, hidden=32)
    stack.tokenizer = Letters()  # type: ignore[assignment]
    return stack


@pytest.fixture
def source(tmp_path: Path) -> Path:
    text = "\n\n".join(f"Paragraph {number} says that {number * 7919} is its number." for number in range(900))
    path = tmp_path / "text.txt"
    path.write_text(text)
    return path


def used(stack: DecoderStack, source: Path, blocks: int) -> TextData:
    assert stack.tokenizer is not None
    return text_blocks(source, stack.tokenizer, length=64, blocks=blocks, split="calibration")


def test_it_reads_the_other_blocks_of_the_calibration_split(stack: DecoderStack, source: Path) -> None:
    calibration = used(stack, source, 20)
    text, held = text_to_heal(stack, source, calibration, 0)
    places = [set(part.source.chosen) for part in (calibration, text, held)]
    assert not places[0] & places[1] and not places[0] & places[2] and not places[1] & places[2]
    assert len(held) == 4 and {text.source.split, held.source.split} == {"calibration"}
    whole = text_blocks(source, Letters(), length=64, split="calibration", seed=None)
    assert sum(map(len, places)) == len(whole)
    assert (text.tokens_NT == whole.tokens_NT[list(text.source.chosen)]).all()


def test_short_text_is_read_again_and_a_single_block_refused(stack: DecoderStack, source: Path) -> None:
    whole = used(stack, source, len(text_blocks(source, Letters(), length=64)))
    text, held = text_to_heal(stack, source, whole, 0)
    assert len(text) + len(held) == len(whole)
    longest = text_blocks(source, Letters(), length=whole.source.tokens)
    with pytest.raises(BadData, match="one block"):
        text_to_heal(stack, source, longest, 0)


def test_the_step_keeps_model_and_record(stack: DecoderStack, source: Path, tmp_path: Path) -> None:
    plan = Plan(stack.spec.fingerprint(), 4, (Edit(1, "drop"),))
    said: list[str] = []
    with Run.open(tmp_path / "run", "optimize", {}) as run:
        from layerwise.allocate.apply import apply

        slim = apply(stack, plan)
        slim.tokenizer = None
        model = slim.save(tmp_path / "model")
        folders = [heal_in(run, stack, model, plan, used(stack, source, 8), source, Duration.parse("3steps"), 0,
                           said.append) for _ in range(2)]
        healing = load_healing(run.path("healing.json"))
        assert list(run.finished) == ["healed"]
    assert folders[0] == folders[1] == tmp_path / "run" / "healed" and (folders[0] / "config.json").exists()
    assert healing.steps == 3 and healing.helped
    assert sum("healing for 3 steps" in line for line in said) == 1 and not (tmp_path / "run" / "healing").exists()


def test_the_record_comes_back_or_is_one_clear_error(tmp_path: Path) -> None:
    save_healing(HEALING, tmp_path / "healing.json")
    assert load_healing(tmp_path / "healing.json") == HEALING
    (tmp_path / "healing.json").write_text("{}")
    with pytest.raises(BadFile, match=r"healing\.json"):
        load_healing(tmp_path / "healing.json")


def test_the_report_tells_of_it_in_words_and_numbers(report: Report, tmp_path: Path) -> None:
    healed = replace(report, healing=HEALING)
    for text in (str(healed), " ".join(summary(healed))):
        assert "120 steps on 122,880 tokens in 10.0 minutes" in text and "0.5912 -> 0.2134" in text
    assert "left as it was" in str(replace(healed, healing=replace(HEALING, helped=False)))
    assert Report.load(healed.save(tmp_path / "report.json")).healing == HEALING
    assert "healing" not in str(report)
