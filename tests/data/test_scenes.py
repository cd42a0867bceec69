"""A drawn world: names, sprites and facts, and what lies where on a picture."""

from __future__ import annotations

import torch

from layerwise.data.scenes import CELL, COLOURS, FACTS, GRID, SIDE, SPRITE, World, draw_one, draw_two

WORLD = World(12)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_world_follows_from_its_seed() -> None:
    assert World(12).names == WORLD.names
    assert World(12, seed=1).names != WORLD.names
    assert len(set(World(64).names)) == 64
    assert torch.equal(World(12).sprites_ESS, WORLD.sprites_ESS)
    assert WORLD.facts_EA.shape == (12, len(FACTS))


def test_sprites_are_symmetric_and_differ() -> None:
    sprites = World(64).sprites_ESS
    assert torch.equal(sprites, sprites.flip(-1))
    assert sprites.shape[1:] == (SPRITE, SPRITE)
    distance_EE = (sprites[:, None] ^ sprites[None]).flatten(2).sum(-1) + 99 * torch.eye(64)
    assert int(distance_EE.min()) >= 32  # four places of six by three, mirrored, four pixels each


def test_every_answer_is_given_equally_often() -> None:
    for column_E, answers in zip(World(64).facts_EA.T, FACTS.values(), strict=True):
        assert torch.equal(column_E.bincount(minlength=len(answers)), torch.full((len(answers),), 8))


def test_two_things_are_different_and_stand_left_and_right() -> None:
    scenes = draw_two(WORLD, 200, generator())
    assert bool((scenes.things_NO[:, 0] != scenes.things_NO[:, 1]).all())
    assert bool((scenes.colours_NO[:, 0] != scenes.colours_NO[:, 1]).all())
    columns_NOG = torch.stack([(scenes.patches_NP == o).view(-1, GRID, GRID).any(1) for o in (1, 2)], 1)
    assert bool(columns_NOG.any(-1).all())
    assert not bool(columns_NOG[:, 0, GRID // 2 :].any())
    assert not bool(columns_NOG[:, 1, : GRID // 2].any())


def test_the_picture_shows_the_sprite_in_its_colour() -> None:
    things = torch.arange(12)
    scenes = draw_one(WORLD, things, generator())
    assert torch.equal(scenes.things_NO[:, 0], things)
    assert bool((scenes.things_NO[:, 1] == -1).all())
    paint_N3 = 255 * torch.tensor(list(COLOURS.values()))[scenes.colours_NO[:, 0]]
    near_NSS = ((scenes.pixels_N3SS.float() - paint_N3[..., None, None]).abs() < 60).all(1)
    for near_SS, sprite in zip(near_NSS, WORLD.sprites_ESS, strict=True):
        wanted = {
            (y, x) for y in range(SIDE - SPRITE + 1) for x in range(SIDE - SPRITE + 1)
            if bool(near_SS[y : y + SPRITE, x : x + SPRITE][sprite].all())
        }
        assert wanted


def test_patches_are_those_whose_centre_the_box_covers() -> None:
    scenes = draw_one(WORLD, torch.zeros(50, dtype=torch.int64), generator())
    covered_N = (scenes.patches_NP == 1).sum(1)
    fewest, most = (SPRITE // CELL) ** 2, (SPRITE // CELL + 1) ** 2
    assert bool(((covered_N >= fewest) & (covered_N <= most)).all())


def test_rows_can_be_picked() -> None:
    scenes = draw_two(WORLD, 10, generator())
    kept = scenes.pick(torch.arange(10) % 2 == 0)
    assert len(kept) == 5
    assert torch.equal(kept.pixels_N3SS[1], scenes.pixels_N3SS[2])
    assert torch.equal(kept.patches_NP[1], scenes.patches_NP[2])
