"""Questions about drawn scenes, as token ids: about the picture, about facts, and as plain text.

Every question has five words, so that sequences of one kind have one length. A picture stands in the tokens
as PATCHES times the token IMAGE; the model puts its own vectors there.

Shapes: N rows, T tokens, P patches, S pixels a side.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from layerwise.data.batch import Batch, slices
from layerwise.data.scenes import COLOURS, FACTS, GRID, Scenes, World
from layerwise.data.text import Source, TextData

UNKNOWN, BEGIN, IMAGE = 0, 1, 2
SPECIAL = ("<unk>", "<bos>", "<image>")
PATCHES = GRID * GRID
SIDES = ("left", "right")
NAMING = "who is shown here ?"
Kind = Literal["name", "side name", "colour", "side", "fact"]


@dataclass(frozen=True)
class SceneData(TextData):
    """Prompts with a picture each, and the token that answers each, int64 [N]."""

    pixels_N3SS: Tensor | None = None
    answers_N: Tensor | None = None

    def batches(self, size: int = 32) -> Iterator[Batch]:
        for rows in slices(len(self), size):
            pictures = {} if self.pixels_N3SS is None else {"pixels_B3SS": self.pixels_N3SS[rows]}
            yield Batch(self.tokens_NT[rows], inputs=pictures)

    def take(self, count: int) -> SceneData:
        return self.pick(torch.arange(min(count, len(self))))

    def pick(self, rows: Tensor) -> SceneData:
        """The given rows: indices, or bool [N]."""
        kept = torch.arange(len(self))[rows]
        return replace(
            self,
            tokens_NT=self.tokens_NT[kept],
            pixels_N3SS=None if self.pixels_N3SS is None else self.pixels_N3SS[kept],
            answers_N=None if self.answers_N is None else self.answers_N[kept],
            source=replace(self.source, chosen=tuple(self.source.chosen[row] for row in kept.tolist())),
        )


class Vocabulary:
    """The words of a world and their token ids; encodes text word by word."""

    def __init__(self, world: World) -> None:
        questions = " ".join([*FACTS, NAMING, "who is on left ? which colour is it ? side . right"]).split()
        words = dict.fromkeys([*SPECIAL, *(word for word in questions if word != "{}")])
        words |= dict.fromkeys([*COLOURS, *(answer for answers in FACTS.values() for answer in answers)])
        self.world, self.words = world, (*words, *world.names)
        self.ids = {word: index for index, word in enumerate(self.words)}

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, text: str) -> list[int]:
        return [self.ids.get(word, UNKNOWN) for word in text.split()]

    @cached_property
    def names_E(self) -> Tensor:
        """Token of every thing's name."""
        return torch.tensor([self.ids[name] for name in self.world.names])

    @cached_property
    def colours_C(self) -> Tensor:
        """Token of every colour."""
        return torch.tensor([self.ids[colour] for colour in COLOURS])

    def answer(self, thing: int, attribute: int) -> str:
        """The word that answers question `attribute` of FACTS about a thing."""
        answers: Sequence[str] = list(FACTS.values())[attribute]
        return answers[int(self.world.facts_EA[thing, attribute])]


def about_scenes(
    vocabulary: Vocabulary, scenes: Scenes, kinds: Sequence[Kind], draw: random.Random, turns: int = 1
) -> SceneData:
    """`turns` different questions of the given `kinds` about every picture, all but the last of them answered.

    "name" and "fact" ask about the only thing; "side name", "colour" and "side" about one of two.
    """
    questions, answers = [], []
    for row in range(len(scenes)):
        *earlier, (question, answer) = draw.sample(_askable(vocabulary, scenes, row, kinds), turns)
        questions.append(" ".join([*(f"{q} {a} ." for q, a in earlier), question]))
        answers.append(answer)
    return prompts(vocabulary, questions, answers, scenes)


def prompts(
    vocabulary: Vocabulary, questions: Sequence[str], answers: Sequence[str], scenes: Scenes | None = None
) -> SceneData:
    """Questions of equal length as rows, after their pictures where `scenes` is given."""
    start = [BEGIN] if scenes is None else [BEGIN, *[IMAGE] * PATCHES]
    tokens_NT = torch.tensor([start + vocabulary.encode(question) for question in questions])
    answers_N = torch.tensor([vocabulary.ids[answer] for answer in answers])
    source = Source("drawn scenes", None, "", tokens_NT.numel(), tuple(range(len(tokens_NT))))
    pixels = None if scenes is None else scenes.pixels_N3SS
    return SceneData(tokens_NT, "scenes", source, None, pixels, answers_N)


def _askable(vocabulary: Vocabulary, scenes: Scenes, row: int, kinds: Sequence[Kind]) -> list[tuple[str, str]]:
    """Every question of the given kinds about one picture, and its answer."""
    things: list[int] = scenes.things_NO[row].tolist()
    names = [vocabulary.world.names[thing] for thing in things]
    colours = [list(COLOURS)[colour] for colour in scenes.colours_NO[row].tolist()]
    asked: dict[Kind, list[tuple[str, str]]] = {
        "name": [(NAMING, names[0])],
        "fact": [(fact(a, "it"), vocabulary.answer(things[0], a)) for a in range(len(FACTS))],
        "side name": [(f"who is on {side} ?", name) for side, name in zip(SIDES, names, strict=True)],
        "colour": [(f"which colour is {name} ?", colour) for name, colour in zip(names, colours, strict=True)],
        "side": [(f"which side is {name} ?", side) for name, side in zip(names, SIDES, strict=True)],
    }
    return [pair for kind in kinds for pair in asked[kind]]


def fact(attribute: int, name: str) -> str:
    """The question about one attribute of a thing called `name`."""
    return f"{list(FACTS)[attribute].format(name)} ?"


def plain_text(vocabulary: Vocabulary, rows: int, length: int, seed: int) -> Tensor:
    """What the world's language model reads: facts, facts about "it", and scenes told in words; int64 [N, T]."""
    draw = random.Random(seed)
    blocks = []
    for _ in range(rows):
        ids = [BEGIN]
        while len(ids) < length:
            ids += vocabulary.encode(draw.choice((_told_fact, _told_scene))(vocabulary, draw))
        blocks.append(ids[:length])
    return torch.tensor(blocks)


def _told_fact(vocabulary: Vocabulary, draw: random.Random) -> str:
    thing, attribute = draw.randrange(vocabulary.world.things), draw.randrange(len(FACTS))
    name, answer = vocabulary.world.names[thing], vocabulary.answer(thing, attribute)
    if draw.random() < 0.5:
        return f"{fact(attribute, name)} {answer} ."
    return f"{name} . {NAMING} {name} . {fact(attribute, 'it')} {answer} ."


def _told_scene(vocabulary: Vocabulary, draw: random.Random) -> str:
    names, colours = draw.sample(vocabulary.world.names, 2), draw.sample(list(COLOURS), 2)
    told = " ".join(f"{side} {colour} {name} ." for side, colour, name in zip(SIDES, colours, names, strict=True))
    asked = draw.sample(
        [f"which colour is {name} ? {colour} ." for name, colour in zip(names, colours, strict=True)]
        + [f"which side is {name} ? {side} ." for name, side in zip(names, SIDES, strict=True)]
        + [f"who is on {side} ? {name} ." for name, side in zip(names, SIDES, strict=True)],
        3,
    )
    return f"{told} {' '.join(asked)}"
