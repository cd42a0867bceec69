"""The trained demo: made once, kept in the cache, opened by name, the same for the same seed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import layerwise as lw
from layerwise.data.scene_text import NAMING, Vocabulary, about_scenes, prompts
from layerwise.data.scenes import draw_one
from layerwise.measure.identity import identity
from layerwise.stack.vision import VisionLanguageStack
from layerwise.train import vision_language
from layerwise.train.checkpoint import Checkpoint
from layerwise.train.vision_language import DEMOS, SMALL, Training, examples, make

TINY = replace(SMALL, things=4, layers=2, hidden=16, widths=(4, 4, 8), read=2, see=2, align=2, tune=2, pictures=16,
               batch=8)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LAYERWISE_CACHE", str(tmp_path))
    monkeypatch.setattr(vision_language, "DEMOS", {"tiny-vlm": TINY, "tiny-vlm-quick": TINY})
    return tmp_path


def test_it_is_trained_once_and_opened_by_name(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = lw.open("tiny-vlm")
    assert isinstance(first, VisionLanguageStack)
    assert first.folder == cache / "models" / "tiny-vlm"
    assert "training it" in capsys.readouterr().err
    monkeypatch.setattr(vision_language, "make", None)
    assert identity(lw.open("tiny-vlm")) == identity(first)
    assert capsys.readouterr().err == ""
    kept = {path.suffix for path in (cache / "models").rglob("*") if path.is_file()}
    assert kept == {".json", ".safetensors", ".lock"}


@pytest.mark.parametrize("killed_at", [1, 3, 4, 7])
def test_a_killed_training_goes_on_and_ends_the_same(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], killed_at: int
) -> None:
    class Killed(Exception):
        pass

    whole = identity(make(TINY))
    monkeypatch.setattr(Checkpoint, "due", lambda *_: True)
    real, calls = vision_language.train, 0

    def killing(parameters: Any, loss: Any, *rest: Any, **options: Any) -> Any:
        def counted(rows: torch.Tensor) -> torch.Tensor:
            nonlocal calls
            if calls == killed_at:
                raise Killed
            calls += 1
            value: torch.Tensor = loss(rows)
            return value

        return real(parameters, counted, *rest, **options)

    monkeypatch.setattr(vision_language, "train", killing)
    with pytest.raises(Killed):
        lw.open("tiny-vlm")
    states = cache / "models" / "tiny-vlm.training"
    assert {path.suffix for path in states.rglob("*") if path.is_file()} == {".json", ".safetensors"}
    assert not (cache / "models" / "tiny-vlm").exists()
    calls, killed_at = 0, TINY.steps - killed_at  # the rest, and not a step more
    assert identity(lw.open("tiny-vlm")) == whole
    assert calls == killed_at
    assert "going on with its training" in capsys.readouterr().err
    assert not states.exists()


def test_what_another_training_left_is_not_taken_up(cache: Path, tmp_path: Path) -> None:
    make(replace(TINY, seed=1), tmp_path / "states")
    assert identity(make(TINY, tmp_path / "states")) == identity(make(TINY))


def test_a_model_of_another_training_is_trained_anew(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = identity(lw.open("tiny-vlm"))
    monkeypatch.setattr(vision_language, "DEMOS", {"tiny-vlm": replace(TINY, seed=1)})
    assert identity(lw.open("tiny-vlm")) != first


def test_the_tokenizer_speaks_the_worlds_words(cache: Path) -> None:
    stack, words = lw.open("tiny-vlm"), Vocabulary(TINY.world)
    assert stack.tokenizer is not None
    assert stack.tokenizer.encode(NAMING) == words.encode(NAMING)
    assert stack.tokenizer.encode("red", special=True) == [1, words.ids["red"]]
    assert stack.tokenizer.decode(words.encode("who is shown")) == "who is shown"
    assert stack.spec.vocabulary == len(words)


def test_the_same_seed_trains_the_same_model() -> None:
    state = torch.random.get_rng_state()
    assert identity(make(TINY)) == identity(make(TINY))
    assert identity(make(TINY)) != identity(make(replace(TINY, seed=1)))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_examples_fit_the_demo_and_mix_all_kinds(cache: Path) -> None:
    stack = lw.open("tiny-vlm")
    assert isinstance(stack, VisionLanguageStack)
    data = examples(stack, 12, seed=0)
    assert len(data) == 12
    scores = lw.measure(stack, data, ["block-influence"], progress=False)
    assert len(scores["block-influence"].values) == TINY.layers


def test_the_demos_are_what_the_names_promise() -> None:
    assert DEMOS["tiny-vlm"] == Training()
    assert DEMOS["tiny-vlm-quick"].steps < Training().steps / 3


@pytest.mark.slow
def test_the_small_one_learns_facts_by_name_and_names_by_picture() -> None:
    stack, words = make(SMALL), Vocabulary(SMALL.world)
    things = torch.arange(SMALL.things).repeat(20)
    pictures = about_scenes(words, draw_one(SMALL.world, things, torch.Generator().manual_seed(5)), ("name",),
                            vision_language.random.Random(0))
    found = stack(pictures.tokens_NT, pixels_B3SS=pictures.pixels_N3SS)[:, -1].argmax(-1)
    assert float((found == pictures.answers_N).float().mean()) > 0.25  # chance is one in eight
    facts = prompts(words, [f"what does {name} eat ?" for name in SMALL.world.names],
                    [words.answer(thing, 0) for thing in range(SMALL.things)])
    assert float((stack(facts.tokens_NT)[:, -1].argmax(-1) == facts.answers_N).float().mean()) > 0.5
