"""The angle between what enters a layer and what leaves n layers on: arccos(cos(h_l, h_l+n)) / pi.

Mean over real tokens. Source: the depth-pruning distance of arXiv 2403.17887. Cost: one forward pass, shared.

Shapes: B rows, T tokens.
"""

from __future__ import annotations

import math
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


def distance(cosine_BT: Tensor) -> Tensor:
    """0 for the same direction, 1/2 for a right angle, 1 for the opposite."""
    return cosine_BT.acos() / math.pi


@dataclass(frozen=True)
class AngularDistance(TokenMean):
    """Mean angle, in half turns, across the `n` layers that begin at each layer.

    The last n - 1 layers have no n layers left and hold nan.
    """

    n: int = 1

    name: ClassVar[str] = "angular-distance"
    sites: ClassVar[frozenset[Site]] = frozenset({"input", "output"})
    unit: ClassVar[str] = "half turns"
    important: ClassVar[Direction] = "high"
    about: ClassVar[str] = "the angle by which the layers from here on turn the residual stream"

    @property
    def label(self) -> str:
        return self.name if self.n == 1 else f"{self.name}:{self.n}"

    @property
    def reach(self) -> int:
        return self.n - 1

    def start(self, spec: StackSpec) -> Means:
        if not 1 <= self.n <= len(spec.rows):
            raise BadOption(f"n={self.n} for {self.name}", expected=f"1..{len(spec.rows)} layers",
                            do="measure across fewer layers")
        return super().start(spec)

    def values(self, seen: Seen) -> Mapping[str, Tensor]:
        return {"": distance(seen.cosine("input", "output", back=self.reach))}
