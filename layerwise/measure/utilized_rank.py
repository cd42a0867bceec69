"""How many directions a layer uses: the rank that holds nearly all variance of what enters it and of what it adds.

    utilization = min(k_in, k_out) / width

k is the smallest number of principal directions with 1 - eps of the variance about the mean; tokens are first
scaled to equal length, since a few of them are long enough in language models to hold all of it. Source: arXiv
2407.04797, there for every matrix (`measure/utilized.py` does that); here for the layer as one map from the residual
stream to what it adds. A sample of n tokens has at most n - 1 directions: give several times the width. Cost:
width^2 for every token, and two decompositions a layer.

Shapes: N tokens, C hidden width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from layerwise.errors import BadOption
from layerwise.measure.base import Forward, Site
from layerwise.measure.scores import Column, Direction
from layerwise.measure.seen import Seen
from layerwise.spec import StackSpec
from layerwise.transform.moments import Moments
from layerwise.transform.subspace import energy_rank

SIDES: tuple[Literal["input", "change"], ...] = ("input", "change")
Sides = dict[str, Moments]


@dataclass(frozen=True)
class UtilizedRank(Forward[list[Sides]]):
    """Share of its directions that a layer reads and writes, counted up to 1 - `eps` of the variance."""

    eps: float = 0.01

    name: ClassVar[str] = "utilized-rank"
    unit: ClassVar[str] = "share of width"
    important: ClassVar[Direction] = "high"
    about: ClassVar[str] = "how many of its directions the layer uses on this data"
    sites: ClassVar[frozenset[Site]] = frozenset({"input", "output"})
    slow: ClassVar[bool] = True

    @property
    def parts(self) -> Mapping[str, str]:
        return {"": self.unit, "inputs": "directions", "outputs": "directions"}

    def start(self, spec: StackSpec) -> list[Sides]:
        if not 0 < self.eps < 1:
            raise BadOption(f"eps={self.eps} for {self.name}", expected="between 0 and 1",
                            do="leave out a small share of the variance, such as 0.01")
        return [{} for _ in spec.rows]

    def update(self, tally: list[Sides], layer: int, seen: Seen) -> None:
        for side in SIDES:
            x_BTC = seen[side]
            x_NC = x_BTC.flatten(0, 1) if seen.mask_BT is None else x_BTC[seen.mask_BT]
            if bool(torch.isfinite(x_NC[:1]).all()):
                tally[layer].setdefault(side, Moments.empty(x_NC.shape[1])).add(unit(x_NC))

    def merge(self, a: list[Sides], b: list[Sides]) -> list[Sides]:
        return [{side: left[side] + right[side] if side in left and side in right else (left | right)[side]
                 for side in left | right} for left, right in zip(a, b, strict=True)]

    def finish(self, tally: list[Sides]) -> tuple[Column, ...]:
        ranks = [[rank(sides.get(side), self.eps) for side in SIDES] for sides in tally]
        widths = [len(sides["input"].sum_I) if "input" in sides else 1 for sides in tally]
        shares = [math.nan if any(map(math.isnan, pair)) else min(pair) / width
                  for pair, width in zip(ranks, widths, strict=True)]
        return (self.column("", shares), self.column("inputs", (pair[0] for pair in ranks)),
                self.column("outputs", (pair[1] for pair in ranks)))


def unit(x_NC: Tensor) -> Tensor:
    """Every row scaled to length one; rows of zeros stay."""
    scaled_NC: Tensor = x_NC / x_NC.norm(dim=1, keepdim=True).clamp(min=1e-30)
    return scaled_NC


def rank(seen: Moments | None, eps: float) -> float:
    """How many principal directions hold 1 - eps of the variance; nan for nothing seen."""
    if seen is None or seen.count < 2:
        return math.nan
    return energy_rank(torch.linalg.eigvalsh(seen.covariance_II), eps)
