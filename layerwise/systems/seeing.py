"""The small vision-language model and its world, as several systems use them.

Shapes: N prompts, T tokens, P patches, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import layerwise as lw
from layerwise.data.scene_text import PATCHES, SceneData, Vocabulary
from layerwise.data.scenes import World
from layerwise.measure.trace import Trace
from layerwise.stack.vision import VisionLanguageStack
from layerwise.systems.base import Size
from layerwise.train.vision_language import DEMOS

PICTURE = slice(1, 1 + PATCHES)
"""Where a picture stands in a prompt: after the first token."""


@dataclass(frozen=True)
class Seeing:
    """The model, its words and its world."""

    stack: VisionLanguageStack
    vocabulary: Vocabulary

    @classmethod
    def open(cls, size: Size) -> Seeing:
        """`tiny-vlm`, or its quick little brother; trained on first use."""
        name = "tiny-vlm" if size == "full" else "tiny-vlm-quick"
        stack = lw.open(name)
        assert isinstance(stack, VisionLanguageStack)
        return cls(stack, Vocabulary(DEMOS[name].world))

    @property
    def world(self) -> World:
        return self.vocabulary.world

    def trace(self, data: SceneData) -> Trace:
        """One pass over prompts, kept at every depth."""
        inputs = {} if data.pixels_N3SS is None else {"pixels_B3SS": data.pixels_N3SS}
        return Trace(self.stack, data.tokens_NT, **inputs)

    def right(self, data: SceneData) -> Tensor:
        """Whether the likeliest next word is the answer, bool [N]."""
        assert data.answers_N is not None
        return self.trace(data).prediction().argmax(-1) == data.answers_N


def positions(length: int, place: slice | int) -> Tensor:
    """The given positions of a prompt as a mask, bool [1, T]."""
    mask_1T = torch.zeros(1, length, dtype=torch.bool)
    mask_1T[:, place] = True
    return mask_1T


def patches(length: int, chosen_NP: Tensor) -> Tensor:
    """The chosen patches of every picture as positions of its prompt, bool [N, T]."""
    mask_NT = torch.zeros(len(chosen_NP), length, dtype=torch.bool)
    mask_NT[:, PICTURE] = chosen_NP
    return mask_NT


def as_many(chosen_NP: Tensor, generator: torch.Generator) -> Tensor:
    """As many patches as are chosen in every row, drawn from those that are not."""
    draw_NP = torch.rand(chosen_NP.shape, generator=generator).masked_fill(chosen_NP, 2.0)
    return draw_NP.argsort(1).argsort(1) < chosen_NP.sum(1, keepdim=True)
