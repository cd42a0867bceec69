"""DoLa: decoding by contrast with an early layer (arXiv 2309.03883).

Of some early layers the one whose prediction lies farthest from the last layer's, by Jensen-Shannon divergence, is
subtracted; only tokens that the last layer finds plausible can be chosen.

Shapes: B rows, J early layers, V vocabulary; all predictions are log-probabilities.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def divergence(a_V: Tensor, b_V: Tensor) -> Tensor:
    """Jensen-Shannon divergence of log-probabilities over the last axis, nats."""
    middle_V = torch.logaddexp(a_V, b_V) - math.log(2)
    return ((a_V.exp() * (a_V - middle_V)).sum(-1) + (b_V.exp() * (b_V - middle_V)).sum(-1)) / 2


def contrast(final_BV: Tensor, early_JBV: Tensor, plausible: float = 0.1) -> tuple[Tensor, Tensor]:
    """Scores [B, V] (minus infinity where a token is not plausible), and which early layer was used, [B].

    A token is plausible where the last layer gives it at least `plausible` of its largest probability.
    """
    chosen_B = divergence(final_BV[None], early_JBV).argmax(0)
    early_BV = early_JBV[chosen_B, torch.arange(len(final_BV))]
    kept_BV = final_BV >= final_BV.amax(-1, keepdim=True) + math.log(plausible)
    return (final_BV - early_BV).masked_fill(~kept_BV, -math.inf), chosen_B
