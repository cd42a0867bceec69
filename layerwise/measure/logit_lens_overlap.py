"""How much of the model's own top k the prediction at a layer's input holds: |top_k(p_l) & top_k(p_L)| / k.

p_l is read through final norm and head from the residual stream entering layer l. Source: arXiv 2512.14064.
Cost: the head on a sample of positions.

Shapes: P sampled positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from layerwise.errors import BadOption
from layerwise.measure.base import Site, TokenMean
from layerwise.measure.scores import Direction
from layerwise.measure.seen import Seen
from layerwise.measure.tally import Means
from layerwise.spec import StackSpec


def overlap(a_Pk: Tensor, b_Pk: Tensor) -> Tensor:
    """Share of each row's entries that are in the same row of the other, [P] float64."""
    return (a_Pk[:, :, None] == b_Pk[:, None, :]).any(-1).double().mean(-1)


@dataclass(frozen=True)
class LogitLensOverlap(TokenMean):
    """Mean share of the model's `k` likeliest tokens that are among the k likeliest at a layer's input."""

    k: int = 5

    name: ClassVar[str] = "logit-lens-overlap"
    sites: ClassVar[frozenset[Site]] = frozenset({"lens"})
    unit: ClassVar[str] = "share"
    important: ClassVar[Direction] = "low"
    about: ClassVar[str] = "how much of the final top tokens the prediction entering the layer already holds"

    def start(self, spec: StackSpec) -> Means:
        if not 1 <= self.k <= spec.vocabulary:
            raise BadOption(f"k={self.k} for {self.name}", expected=f"1..{spec.vocabulary}, the vocabulary",
                            do="compare fewer tokens")
        return super().start(spec)

    def values(self, seen: Seen) -> Mapping[str, Tensor]:
        return {"": overlap(seen.lens.top(self.k), seen.final.top(self.k))}
