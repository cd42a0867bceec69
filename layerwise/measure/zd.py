"""Z-score distribution: the share of a layer's weights more than one standard deviation above their mean.

Source: arXiv 2406.17415, where smaller means more important. Weights are those of the block's matrices.
The paper's text has z > 1 over all weights of the layer; one re-implementation counts |z| > 1 and averages
over matrices, which `two_sided` and `pool` give. Cost: one reading of the weights; no data.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from layerwise.measure.base import Call, PerLayer
from layerwise.measure.scores import Direction
from layerwise.measure.weights import tensors
from layerwise.stack.base import Stack

CHUNK = 2**20
"""Weights held in float32 at once."""


def share_beyond(weights: Sequence[Tensor], two_sided: bool = False) -> float:
    """Share of all weights with z > 1, or |z| > 1; moments in float64, with the population's deviation."""
    count = sum(weight.numel() for weight in weights)
    mean = math.fsum(float(weight.sum(dtype=torch.float64)) for weight in weights) / count
    squares = math.fsum(float(torch.linalg.vector_norm(weight, dtype=torch.float64)) ** 2 for weight in weights)
    deviation = math.sqrt(squares / count - mean**2)
    centred = (part.float() - mean for weight in weights for part in weight.flatten().split(CHUNK))
    return sum(int(((w.abs() if two_sided else w) > deviation).sum()) for w in centred) / count


@dataclass(frozen=True)
class ZScoreDistribution(PerLayer):
    """Share of weights with z > 1; pooled over the block, or the mean over its matrices."""

    two_sided: bool = False
    pool: Literal["block", "matrices"] = "block"

    name: ClassVar[str] = "zd"
    unit: ClassVar[str] = "share"
    important: ClassVar[Direction] = "low"
    about: ClassVar[str] = "share of weights more than one standard deviation above the mean"

    def of(self, stack: Stack, layer: int, call: Call | None) -> Mapping[str, float]:
        matrices = [weight for _, weight in tensors(stack.block(layer)) if weight.dim() > 1]
        groups = [matrices] if self.pool == "block" else [[weight] for weight in matrices]
        shares = [share_beyond(group, self.two_sided) for group in groups if group]
        return {"": sum(shares) / len(shares) if shares else math.nan}
