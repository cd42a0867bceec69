"""First-order estimate of what zeroing a layer's weights does to the loss: sum of |w * dloss/dw|.

The product is summed over batches with its sign and its absolute value taken last. Source: the Taylor
ranking compared in arXiv 2411.15558, here with the mean loss over all predicted tokens, so that the size of
batches does not matter. Cost: one forward pass, one more with gradients, and the backward.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from layerwise.measure.base import WeightGradient
from layerwise.measure.scores import Direction


def saliency(weight: Tensor, gradient: Tensor) -> float:
    """Sum of |w g|, products in float32, sum in float64."""
    return float((weight.float() * gradient).abs().sum(dtype=torch.float64))


@dataclass(frozen=True)
class Taylor(WeightGradient):
    """Sum over a layer's weights of the absolute product of weight and gradient."""

    name: ClassVar[str] = "taylor"
    unit: ClassVar[str] = "nats"
    important: ClassVar[Direction] = "high"
    about: ClassVar[str] = "first-order change of the loss without the layer's weights"

    def of(self, weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> float:
        return math.fsum(saliency(weight, gradients[name]) for name, weight in weights.items())
