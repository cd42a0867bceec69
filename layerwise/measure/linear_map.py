"""How well one affine map turns the residual stream of one model into that of another, layer against layer.

Source: arXiv 2505.13898, which fits A g + b by gradient descent; here the same least-squares problem is
solved in closed form with a ridge, on one half of the tokens, and scored on the other.

Shapes: M layers of the shallow model, G of the deep one, N tokens, C and D hidden widths.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def map_errors(shallow: Sequence[Tensor], deep: Sequence[Tensor], ridge: float = 1e-3) -> Tensor:
    """Mean of |A h_m + b - g_l| / |g_l| over held-out tokens, [M, G]; inputs are [N, C] and [N, D] a layer.

    Even tokens fit the map and odd tokens score it.
    """
    errors = torch.zeros(len(shallow), len(deep), dtype=torch.float64)
    targets = [g_ND.double() for g_ND in deep]
    for m, h_NC in enumerate(shallow):
        x_NC = torch.cat([h_NC.double(), torch.ones(len(h_NC), 1, dtype=torch.float64)], 1)
        gram_CC = x_NC[::2].T @ x_NC[::2]
        gram_CC.diagonal().add_(ridge * gram_CC.diagonal().mean())
        for layer, g_ND in enumerate(targets):
            map_CD = torch.linalg.solve(gram_CC, x_NC[::2].T @ g_ND[::2])
            left_N = (x_NC[1::2] @ map_CD - g_ND[1::2]).norm(dim=-1)
            errors[m, layer] = (left_N / g_ND[1::2].norm(dim=-1).clamp(min=1e-6)).mean()
    return errors
