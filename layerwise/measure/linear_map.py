"""How well one affine map turns the residual stream of one model into that of another, layer against layer.

Source: arXiv 2505.13898, which fits A h + b by gradient descent; here the same least-squares problem is
solved in closed form with a ridge, on one half of the tokens, and scored on the other.

Shapes: M layers of the shallow model, G of the deep one, N tokens, C and D hidden widths.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from layerwise.stack.base import Stack


def map_errors(shallow: Sequence[Tensor], deep: Sequence[Tensor], ridge: float = 1e-3) -> Tensor:
    """Mean of |A h_m + b - g_l| / |g_l| over held-out tokens, [M, G]; inputs are [N, C] and [N, D] a layer.

    Even tokens fit the map and odd tokens score it.
    """
    errors = torch.zeros(len(shallow), len(deep), dtype=torch.float64)
    for m, h_NC in enumerate(shallow):
        x_NC = with_one(h_NC)
        root_CC = ridged(x_NC[::2].T @ x_NC[::2], ridge)
        for layer, g_ND in enumerate(deep):
            g_ND = g_ND.double()
            map_CD = torch.cholesky_solve(x_NC[::2].T @ g_ND[::2], root_CC)
            left_N = (x_NC[1::2] @ map_CD - g_ND[1::2]).norm(dim=-1)
            errors[m, layer] = (left_N / g_ND[1::2].norm(dim=-1).clamp(min=1e-6)).mean()
    return errors


def with_one(h_NC: Tensor) -> Tensor:
    """Rows in float64 with a one at their end, for the constant of an affine map, [N, C + 1]."""
    return torch.cat([h_NC.double(), torch.ones(len(h_NC), 1, dtype=torch.float64, device=h_NC.device)], 1)


def ridged(gram_CC: Tensor, ridge: float) -> Tensor:
    """The Cholesky factor of a Gram matrix with `ridge` times its mean diagonal added to the diagonal."""
    raised_CC = gram_CC + ridge * gram_CC.diagonal().mean() * torch.eye(len(gram_CC)).to(gram_CC)
    root_CC: Tensor = torch.linalg.cholesky(raised_CC)
    return root_CC


def matches(errors_MG: Tensor) -> list[int]:
    """The deep layer that each shallow one maps to best.

    Errors are relative to each deep layer's mean, or layers that are easy for everything would win.
    """
    best: list[int] = (errors_MG / errors_MG.mean(0)).argmin(1).tolist()
    return best


@torch.inference_mode()
def leaving(stack: Stack, tokens_BT: Tensor, places_BT: Tensor | None = None) -> list[Tensor]:
    """What leaves every layer at `places_BT` (bool; all but the first unless given), float32 [N, C] each."""
    if places_BT is None:
        places_BT = torch.ones_like(tokens_BT, dtype=torch.bool)
        places_BT[:, 0] = False
    state, seen = stack.start(tokens_BT), []
    for layer in range(len(stack)):
        state = stack.run(state, slice(layer, layer + 1))
        seen.append(state.hidden[places_BT.to(state.hidden.device)].float().cpu())
    return seen
