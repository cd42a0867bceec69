"""How far the prediction at a layer's input is from the model's own: KL(p_l || p_L), mean over a sample.

p_l is the softmax of final norm and head on the residual stream entering layer l, p_L the model's output.
Source: arXiv 2512.14064, lens distribution first as there. Cost: the head on a sample of positions.

Shapes: P sampled positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from layerwise.measure.base import Site, TokenMean
from layerwise.measure.scores import Direction
from layerwise.measure.seen import Reading, Seen, inner


def divergence(lens: Reading, final: Reading) -> Tensor:
    """KL(lens || final) at each position in nats, [P]."""
    return inner(lens.p_PV, lens.log_p_PV - final.log_p_PV)


@dataclass(frozen=True)
class LogitLensKL(TokenMean):
    """Mean KL divergence of the lens prediction from the model's own."""

    name: ClassVar[str] = "logit-lens-kl"
    sites: ClassVar[frozenset[Site]] = frozenset({"lens"})
    unit: ClassVar[str] = "nats"
    important: ClassVar[Direction] = "high"
    about: ClassVar[str] = "how far from final the prediction is where it enters the layer"

    def values(self, seen: Seen) -> Mapping[str, Tensor]:
        return {"": divergence(seen.lens, seen.final)}
