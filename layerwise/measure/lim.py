"""Layer input modification: -cos(x, y) of what enters and what leaves a layer, mean over tokens.

Source: arXiv 2406.17415. It is block influence minus one and ranks layers the same. Cost: one forward pass,
shared.

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


@dataclass(frozen=True)
class LayerInputModification(TokenMean):
    """Mean over tokens of minus the cosine between a layer's input and output."""

    name: ClassVar[str] = "lim"
    sites: ClassVar[frozenset[Site]] = frozenset({"input", "output"})
    unit: ClassVar[str] = "-cosine"
    important: ClassVar[Direction] = "high"
    about: ClassVar[str] = "how much the layer modifies its input"

    def values(self, seen: Seen) -> Mapping[str, Tensor]:
        return {"": -seen.cosine("input", "output")}
