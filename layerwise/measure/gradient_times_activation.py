"""How much of the loss hangs on a layer's states, to first order: |sum over channels of dloss/dh * h|, mean of tokens.

    attribution = |g . h|        change = |g . (h - x)|

x enters the layer, h leaves it, and g is the gradient with respect to h of the loss summed over all predictions: of
next tokens, in a module of labels. `change` takes alone what the layer adds: to first order, what the loss does without
it at that token. Source: gradient x input (Shrikumar et al. 2016, arXiv 1605.01713), on the states inside. The sum
makes a token's value independent of how much other data there is, so that parts merge exactly.

Only `change` ranks layers. A norm undoes the length of what enters it, so the states that leave the last layer of a
decoder have no attribution at all. Cost: one forward pass, one more with gradients, and the backward, batch by batch.

Shapes: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from layerwise.measure.base import StateGradient
from layerwise.measure.scores import Column, Direction
from layerwise.measure.seen import Seen
from layerwise.measure.tally import Means


@dataclass(frozen=True)
class GradientTimesActivation(StateGradient):
    """Mean over tokens of the absolute inner product of a layer's states and their gradients."""

    name: ClassVar[str] = "gradient-times-activation"
    unit: ClassVar[str] = "nats"
    important: ClassVar[Direction] = "high"
    about: ClassVar[str] = "first-order change of the loss without what the layer adds at a token"

    @property
    def parts(self) -> Mapping[str, str]:
        return {"": self.unit, "change": self.unit}

    def values(self, seen: Seen) -> Mapping[str, Tensor]:
        return {"": seen.dot("output", "gradient").abs(), "change": seen.dot("change", "gradient").abs()}

    def finish(self, tally: Means) -> tuple[Column, ...]:
        whole, change = super().finish(tally)
        about = "first-order change of the loss without a token's state after the layer"
        return replace(whole, important=None, about=about), change
