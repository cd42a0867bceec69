"""How far a layer turns the residual stream: 1 - cos(x, y) of what enters and what leaves, mean over tokens.

Source: the block influence of ShortGPT (arXiv 2403.03853), averaged per token over real tokens only.
Cost: one forward pass, shared.

Shapes: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from layerwise.measure.base import Site, TokenMean
from layerwise.measure.scores import Direction
from layerwise.measure.seen import Seen


def influence(cosine_BT: Tensor) -> Tensor:
    """0 where the layer keeps the direction, 1 where it turns to a right angle, 2 where it turns round."""
    return 1 - cosine_BT


@dataclass(frozen=True)
class BlockInfluence(TokenMean):
    """Mean over tokens of 1 - cosine between a layer's input and output."""

    name: ClassVar[str] = "block-influence"
    sites: ClassVar[frozenset[Site]] = frozenset({"input", "output"})
    unit: ClassVar[str] = "1 - cosine"
    important: ClassVar[Direction] = "high"
    about: ClassVar[str] = "how far the layer turns the residual stream"

    def values(self, seen: Seen) -> Mapping[str, Tensor]:
        return {"": influence(seen.cosine("input", "output"))}
