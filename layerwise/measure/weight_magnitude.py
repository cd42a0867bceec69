"""How large a layer's weights are: sum of |w|^p over every matrix, norm and bias of the block, no root.

Source: the magnitude rankings compared in arXiv 2411.15558. Cost: one reading of the weights; no data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from layerwise.measure.base import Call, PerLayer
from layerwise.measure.scores import Direction
from layerwise.measure.weights import tensors
from layerwise.stack.base import Stack


def magnitude(weight: Tensor, power: int) -> float:
    """Sum of |w|^power, accumulated in float64."""
    return float(torch.linalg.vector_norm(weight, power, dtype=torch.float64)) ** power


@dataclass(frozen=True)
class _Magnitude(PerLayer):
    power: ClassVar[int]
    important: ClassVar[Direction] = "high"

    def of(self, stack: Stack, layer: int, call: Call | None) -> Mapping[str, float]:
        return {"": sum(magnitude(weight, self.power) for _, weight in tensors(stack.block(layer)))}


@dataclass(frozen=True)
class WeightL1(_Magnitude):
    """Sum of absolute weights."""

    name: ClassVar[str] = "weight-l1"
    unit: ClassVar[str] = "sum |w|"
    about: ClassVar[str] = "sum of the absolute values of all weights"
    power: ClassVar[int] = 1


@dataclass(frozen=True)
class WeightL2(_Magnitude):
    """Sum of squared weights."""

    name: ClassVar[str] = "weight-l2"
    unit: ClassVar[str] = "sum w^2"
    about: ClassVar[str] = "sum of the squares of all weights"
    power: ClassVar[int] = 2
