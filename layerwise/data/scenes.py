"""A small world that can be drawn: things with names, looks and facts, and pictures with one or two of them.

A thing is known by its sprite, whatever its colour and place. Pictures are divided into GRID x GRID patches.

Shapes: N pictures, O objects of a picture (left, right), P patches, S pixels a side, E things, A attributes.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property

import torch
from torch import Tensor

SIDE, GRID, SPRITE = 32, 4, 12
CELL = SIDE // GRID

COLOURS: Mapping[str, tuple[float, float, float]] = {
    "red": (1.0, 0.1, 0.1), "green": (0.1, 0.9, 0.2), "blue": (0.2, 0.3, 1.0), "yellow": (1.0, 1.0, 0.1),
    "purple": (0.7, 0.1, 0.9), "white": (1.0, 1.0, 1.0),
}

FACTS: Mapping[str, tuple[str, ...]] = {
    "what does {} eat": ("leaf", "fish", "seed", "moss", "root", "berry", "worm", "honey"),
    "where does {} live": ("river", "forest", "cave", "desert", "reef", "marsh", "tundra", "island"),
    "what does {} say": ("hoo", "click", "growl", "whistle", "hum", "bark", "squeak", "trill"),
    "when does {} sleep": ("dawn", "morning", "noon", "evening", "dusk", "midnight", "winter", "summer"),
}
"""Question to its possible answers; {} is the name of the thing, or a word that stands for it."""


@dataclass(frozen=True)
class World:
    """`things` things drawn by `seed`: the same seed gives the same names, sprites and facts."""

    things: int = 64
    seed: int = 0

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Invented words of two syllables, all different."""
        syllables = ["".join(parts) for parts in itertools.product("bdfgklmnprtvz", "aeiou")]
        words = ["".join(pair) for pair in itertools.permutations(syllables, 2)]
        order = torch.randperm(len(words), generator=self._generator(1))[: self.things]
        return tuple(words[index] for index in order.tolist())

    @cached_property
    def sprites_ESS(self) -> Tensor:
        """Patterns of 6 x 6, left as right, every two different in at least four of 18 places; scaled by two."""
        generator = self._generator(2)
        halves: list[Tensor] = []
        while len(halves) < self.things:
            half = torch.rand(6, 3, generator=generator) < 0.5
            if 7 <= int(half.sum()) <= 12 and all(int((half ^ other).sum()) >= 4 for other in halves):
                halves.append(half)
        half_E63 = torch.stack(halves)
        whole_E66 = torch.cat([half_E63, half_E63.flip(-1)], -1)
        return whole_E66.repeat_interleave(SPRITE // 6, 1).repeat_interleave(SPRITE // 6, 2)

    @cached_property
    def facts_EA(self) -> Tensor:
        """Index of the answer to every question in FACTS, int64; each answer equally often, as far as it goes."""
        generator = self._generator(3)
        columns = [
            (torch.arange(self.things) % len(answers))[torch.randperm(self.things, generator=generator)]
            for answers in FACTS.values()
        ]
        return torch.stack(columns, 1)

    def _generator(self, part: int) -> torch.Generator:
        return torch.Generator().manual_seed(100 * self.seed + part)


@dataclass(frozen=True)
class Scenes:
    """Pictures and what is on them.

    `pixels_N3SS` is uint8. `things_NO` and `colours_NO` are -1 where there is no second object.
    `patches_NP` is 1 or 2 where the centre of a patch lies on the first or second object, else 0.
    """

    pixels_N3SS: Tensor
    things_NO: Tensor
    colours_NO: Tensor
    patches_NP: Tensor

    def __len__(self) -> int:
        return len(self.pixels_N3SS)

    def pick(self, rows_N: Tensor) -> Scenes:
        """The given rows: indices, or bool [N]."""
        return Scenes(*(getattr(self, part.name)[rows_N] for part in fields(self)))


def draw_one(world: World, things_N: Tensor, generator: torch.Generator) -> Scenes:
    """A picture of each given thing alone, anywhere, in any colour."""
    count = len(things_N)
    room = SIDE - SPRITE + 1
    corners_N12 = torch.randint(room, (count, 1, 2), generator=generator)
    return _draw(world, things_N[:, None], corners_N12, generator)


def draw_two(world: World, count: int, generator: torch.Generator) -> Scenes:
    """Pictures of two different things in different colours: the first in the left half, the second in the right."""
    things_N2 = _different(world.things, count, generator)
    half = SIDE // 2
    across_N2 = torch.randint(half - SPRITE + 1, (count, 2), generator=generator) + torch.tensor([0, half])
    down_N2 = torch.randint(SIDE - SPRITE + 1, (count, 2), generator=generator)
    return _draw(world, things_N2, torch.stack([down_N2, across_N2], -1), generator)


def _different(choices: int, count: int, generator: torch.Generator) -> Tensor:
    """Two different numbers below `choices` in every row, [N, 2]."""
    first_N = torch.randint(choices, (count,), generator=generator)
    step_N = torch.randint(1, choices, (count,), generator=generator)
    return torch.stack([first_N, (first_N + step_N) % choices], 1)


def _draw(world: World, things_NO: Tensor, corners_NO2: Tensor, generator: torch.Generator) -> Scenes:
    count, objects = things_NO.shape
    colours_NO = _different(len(COLOURS), count, generator)[:, :objects]
    paint_NO3 = torch.tensor(list(COLOURS.values()))[colours_NO]
    ground_N3 = 0.35 * torch.rand(count, 3, generator=generator)
    pixels_N3SS = ground_N3[:, :, None, None].repeat(1, 1, SIDE, SIDE)
    patches_NP = torch.zeros(count, GRID * GRID, dtype=torch.int64)
    for o in range(objects):
        inside_NSS, covered_NSS = _place(world.sprites_ESS[things_NO[:, o]], corners_NO2[:, o])
        pixels_N3SS = torch.where(inside_NSS[:, None], paint_NO3[:, o, :, None, None], pixels_N3SS)
        centres_NGG = covered_NSS[:, CELL // 2 :: CELL, CELL // 2 :: CELL]
        patches_NP = torch.where(centres_NGG.flatten(1), o + 1, patches_NP)
    pixels_N3SS = pixels_N3SS + 0.04 * torch.randn(pixels_N3SS.shape, generator=generator)
    pixels_N3SS = (pixels_N3SS.clamp(0, 1) * 255).round().to(torch.uint8)
    absent = torch.full((count, 2 - objects), -1)
    return Scenes(
        pixels_N3SS, torch.cat([things_NO, absent], 1), torch.cat([colours_NO, absent], 1), patches_NP
    )


def _place(sprites_Nss: Tensor, corners_N2: Tensor) -> tuple[Tensor, Tensor]:
    """Sprites on an empty square with their upper left corners at (down, across), and the boxes they fill."""
    grid = torch.arange(SIDE)
    down_NS1 = (grid[None] - corners_N2[:, :1])[:, :, None]
    across_N1S = (grid[None] - corners_N2[:, 1:])[:, None, :]
    covered_NSS = (down_NS1 >= 0) & (down_NS1 < SPRITE) & (across_N1S >= 0) & (across_N1S < SPRITE)
    rows = torch.arange(len(sprites_Nss))[:, None, None]
    inside_NSS = sprites_Nss[rows, down_NS1.clamp(0, SPRITE - 1), across_N1S.clamp(0, SPRITE - 1)]
    return inside_NSS & covered_NSS, covered_NSS
