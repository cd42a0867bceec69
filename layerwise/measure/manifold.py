"""The shape of the cloud of states that leave a layer: its dimensions, and how far apart neighbours are.

Columns: `intrinsic-dimension` by two neighbours, `participation-ratio`, and `neighbour-distance`, the mean
distance to the `k` nearest states divided by the root mean square distance to the mean. Source: arXiv
2509.22518 reads the same three off pooled states; here every token is a state. Cost: one forward pass and a
sample of `points` tokens per layer.

The sample holds the tokens whose keys are smallest; a key is the fraction of a large multiple of a fixed
random projection of the state. It depends on the state alone, so neither order, batches nor merging change it.

Shapes: N tokens, C hidden width, P points kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from layerwise.errors import BadOption
from layerwise.measure.base import Forward, Site
from layerwise.measure.neighbours import deviation, participation_ratio, two_nn
from layerwise.measure.scores import Column
from layerwise.measure.seen import Seen
from layerwise.spec import StackSpec

SPREAD = 997.0
"""Multiple of the projection, in units of the state's length; its fraction is even over [0, 1)."""


@dataclass
class Cloud:
    """States of one layer, float32 [P, C], with their keys ascending."""

    keys_P: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.float64))
    points_PC: Tensor = field(default_factory=lambda: torch.empty(0, 0))

    def joined(self, keys_N: Tensor, points_NC: Tensor, most: int) -> Cloud:
        """The `most` smallest keys of both and their states."""
        keys, points = keys_N, points_NC
        if len(self.keys_P):
            keys, points = torch.cat([self.keys_P, keys_N]), torch.cat([self.points_PC, points_NC])
        order = keys.argsort(stable=True)[:most]
        return Cloud(keys[order], points[order])


@dataclass(frozen=True)
class Manifold(Forward[list[Cloud]]):
    """Dimensions and neighbour distance of the states that leave a layer, from `points` of its tokens."""

    points: int = 512
    k: int = 5

    name: ClassVar[str] = "manifold"
    unit: ClassVar[str] = ""
    important: ClassVar[None] = None
    about: ClassVar[str] = "shape of the cloud of states after the layer"
    sites: ClassVar[frozenset[Site]] = frozenset({"output"})

    @property
    def parts(self) -> Mapping[str, str]:
        return {"intrinsic-dimension": "dimensions", "participation-ratio": "dimensions",
                "neighbour-distance": "share of spread"}

    def start(self, spec: StackSpec) -> list[Cloud]:
        if not 0 < self.k < self.points:
            raise BadOption(f"k={self.k}, points={self.points}", expected="1 <= k < points",
                            do="keep more points, or look at fewer neighbours")
        return [Cloud() for _ in spec.rows]

    def update(self, tally: list[Cloud], layer: int, seen: Seen) -> None:
        x_BTC = seen["output"]
        x_NC = (x_BTC.flatten(0, 1) if seen.mask_BT is None else x_BTC[seen.mask_BT]).cpu()
        keys_N = keys(x_NC)
        chosen = keys_N.argsort(stable=True)[: self.points]
        tally[layer] = tally[layer].joined(keys_N[chosen], x_NC[chosen].clone(), self.points)

    def merge(self, a: list[Cloud], b: list[Cloud]) -> list[Cloud]:
        return [left.joined(right.keys_P, right.points_PC, self.points) if len(right.keys_P) else left
                for left, right in zip(a, b, strict=True)]

    def finish(self, tally: list[Cloud]) -> tuple[Column, ...]:
        rows = [self._shape(cloud.points_PC) for cloud in tally]
        return tuple(self.column(part, (row[place] for row in rows)) for place, part in enumerate(self.parts))

    def _shape(self, points_PC: Tensor) -> tuple[float, float, float]:
        if len(points_PC) <= self.k:
            return math.nan, math.nan, math.nan
        spread = float((points_PC.double() - points_PC.double().mean(0)).square().sum(1).mean().sqrt())
        near = float(deviation(points_PC, points_PC, self.k, inside=True).mean())
        return two_nn(points_PC), participation_ratio(points_PC), near / spread if spread else math.nan


def keys(points_NC: Tensor) -> Tensor:
    """A number in [0, 1) for every state, from its direction alone, float64 [N]."""
    generator = torch.Generator().manual_seed(0)
    axis_C = torch.randn(points_NC.shape[1], generator=generator, dtype=torch.float64)
    x_NC = points_NC.double()
    cosine_N = x_NC @ axis_C / x_NC.norm(dim=1).clamp(min=1e-30)
    return torch.remainder(SPREAD * cosine_N, 1.0)
