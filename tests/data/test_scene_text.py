"""Questions about scenes: right answers, equal lengths, and rows that keep together."""

from __future__ import annotations

import random

import torch

from layerwise.data.scene_text import (
    BEGIN,
    IMAGE,
    PATCHES,
    SIDES,
    UNKNOWN,
    Vocabulary,
    about_scenes,
    fact,
    plain_text,
    prompts,
)
from layerwise.data.scenes import COLOURS, FACTS, World, draw_one, draw_two

WORLD = World(12)
WORDS = Vocabulary(WORLD)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def said(ids: torch.Tensor) -> list[str]:
    return [WORDS.words[index] for index in ids.tolist()]


def test_every_word_has_one_token() -> None:
    assert len(set(WORDS.words)) == len(WORDS)
    assert WORDS.encode("red nonsense ?") == [WORDS.ids["red"], UNKNOWN, WORDS.ids["?"]]
    assert [WORDS.words[index] for index in WORDS.names_E] == list(WORLD.names)


def test_questions_about_two_things_are_answered_from_the_scene() -> None:
    scenes = draw_two(WORLD, 60, generator())
    data = about_scenes(WORDS, scenes, ("side name", "colour", "side"), random.Random(0))
    assert data.tokens_NT.shape == (60, 1 + PATCHES + 5)
    assert bool((data.tokens_NT[:, 0] == BEGIN).all())
    assert bool((data.tokens_NT[:, 1 : 1 + PATCHES] == IMAGE).all())
    for row in range(60):
        question, answer = said(data.tokens_NT[row])[1 + PATCHES :], said(data.answers_N[row : row + 1])[0]
        names = [WORLD.names[thing] for thing in scenes.things_NO[row]]
        colours = [list(COLOURS)[colour] for colour in scenes.colours_NO[row]]
        if question[0] == "who":
            assert answer == names[SIDES.index(question[3])]
        elif question[1] == "colour":
            assert answer == colours[names.index(question[3])]
        else:
            assert answer == SIDES[names.index(question[3])]


def test_facts_are_asked_without_the_name() -> None:
    scenes = draw_one(WORLD, torch.arange(12), generator())
    data = about_scenes(WORDS, scenes, ("fact",), random.Random(0))
    attributes = [fact(attribute, "it") for attribute in range(len(FACTS))]
    for row in range(12):
        question = " ".join(said(data.tokens_NT[row])[1 + PATCHES :])
        assert said(data.answers_N[row : row + 1])[0] == WORDS.answer(row, attributes.index(question))


def test_earlier_turns_are_answered_and_differ_from_the_last() -> None:
    data = about_scenes(WORDS, draw_two(WORLD, 20, generator()), ("colour", "side"), random.Random(0), turns=3)
    assert data.tokens_NT.shape == (20, 1 + PATCHES + 7 + 7 + 5)
    for row in range(20):
        words = said(data.tokens_NT[row])[1 + PATCHES :]
        turns = [tuple(words[:5]), tuple(words[7:12]), tuple(words[14:])]
        assert len(set(turns)) == 3
        assert words[6] == words[13] == "."


def test_rows_keep_together() -> None:
    data = about_scenes(WORDS, draw_two(WORLD, 20, generator()), ("side",), random.Random(0))
    kept = data.pick(torch.arange(20) >= 15)
    assert len(kept) == 5
    assert torch.equal(kept.pixels_N3SS[0], data.pixels_N3SS[15])
    assert torch.equal(kept.answers_N, data.answers_N[15:])
    assert len(data.take(3)) == 3
    batches = list(data.batches(8))
    assert [len(batch.tokens_BT) for batch in batches] == [8, 8, 4]
    assert torch.equal(batches[2].inputs["pixels_B3SS"], data.pixels_N3SS[16:])
    text = prompts(WORDS, [fact(0, WORLD.names[0])], [WORDS.answer(0, 0)])
    assert next(text.batches(4)).inputs == {}


def test_plain_text_tells_true_facts() -> None:
    rows = plain_text(WORDS, 50, 40, seed=0)
    assert rows.shape == (50, 40)
    assert torch.equal(rows, plain_text(WORDS, 50, 40, seed=0))
    assert not bool((rows == UNKNOWN).any())
    checked = 0
    for row in rows:
        words = said(row)
        for at in range(len(words) - 5):
            if words[at : at + 2] == ["what", "does"] and words[at + 3] == "eat" and words[at + 2] in WORLD.names:
                assert words[at + 5] == WORDS.answer(WORLD.names.index(words[at + 2]), 0)
                checked += 1
    assert checked > 5
