"""Where pictures stand in a prompt, and patches drawn as controls."""

from __future__ import annotations

import random

import torch

from layerwise.data.scene_text import IMAGE, Vocabulary, about_scenes
from layerwise.data.scenes import World, draw_two
from layerwise.systems.seeing import PICTURE, as_many, patches, positions


def test_the_picture_is_where_the_image_tokens_are() -> None:
    world = World(8)
    scenes = draw_two(world, 5, torch.Generator().manual_seed(0))
    tokens_NT = about_scenes(Vocabulary(world), scenes, ("side",), random.Random(0)).tokens_NT
    length = tokens_NT.shape[1]
    assert torch.equal((tokens_NT == IMAGE)[:1], positions(length, PICTURE))
    everything = torch.ones_like(scenes.patches_NP, dtype=torch.bool)
    assert torch.equal(patches(length, everything), tokens_NT == IMAGE)
    assert positions(length, length - 1).nonzero().tolist() == [[0, length - 1]]


def test_as_many_patches_are_drawn_from_the_others() -> None:
    chosen = torch.rand(200, 16, generator=torch.Generator().manual_seed(0)).argsort(1) < 5
    drawn = as_many(chosen, torch.Generator().manual_seed(1))
    assert torch.equal(drawn.sum(1), torch.full((200,), 5))
    assert not bool((drawn & chosen).any())
    assert len(drawn.unique(dim=0)) > 190
