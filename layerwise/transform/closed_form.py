"""Weights that give a wanted output for some inputs and change as little as possible for all others.

With W the matrix, C the uncentred second moment of its usual inputs, k an input and v its wanted output:

    one     W + (v - W k0) u' / (u' k0),  u = C^-1 k            (ROME, arXiv 2202.05262)
    many    W + R K' (weight C + K K')^-1,  R = V - W K          (MEMIT, arXiv 2210.07229)

The first meets its one wish exactly; the second weighs all of its wishes against the usual inputs.

Shapes: O outputs, I inputs, N wishes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from layerwise.errors import BadData

RIDGE = 1e-4
"""Added to the diagonal, as a part of its mean: a moment of few tokens has directions without any."""


def ridged(moment_II: Tensor, ridge: float = RIDGE) -> Tensor:
    """`moment_II` with `ridge` of its mean diagonal added to the diagonal, float64."""
    moment_II = moment_II.double()
    mean = float(moment_II.diagonal().mean())
    return moment_II + max(mean, torch.finfo(torch.float64).tiny) * ridge * torch.eye(
        len(moment_II), dtype=torch.float64, device=moment_II.device)


def directions(keys_NI: Tensor, moment_II: Tensor) -> Tensor:
    """C^-1 k of every key at length one, float64 [N, I]: where a change meets the key and usual inputs least."""
    found_NI: Tensor = torch.linalg.solve(moment_II.double(), keys_NI.double().T).T
    length_N1: Tensor = found_NI.norm(dim=1, keepdim=True)
    return found_NI / length_N1


def rank_one(weight_OI: Tensor, direction_I: Tensor, residual_O: Tensor, now_I: Tensor) -> Tensor:
    """The matrix after one wish: its output for the input `now_I` moves by `residual_O`.

    `direction_I` is that of the key, from `directions`. In float64, returned in the dtype of `weight_OI`.
    Raises BadData where the direction does not meet the input.
    """
    overlap = float(direction_I.double() @ now_I.double())
    if abs(overlap) <= 1e-9 * float(now_I.double().norm()):
        raise BadData("a key that the input does not meet", expected="a key like the input that is to be changed",
                      do="take the key at the same token of the same prompt")
    changed_OI: Tensor = weight_OI.double() + torch.outer(residual_O.double(), direction_I.double() / overlap)
    return changed_OI.to(weight_OI.dtype)


def batch(weight_OI: Tensor, keys_NI: Tensor, residuals_NO: Tensor, moment_II: Tensor, weight: float) -> Tensor:
    """The matrix after many wishes at once: the output for each key moves towards its residual.

    `weight` says how much the usual inputs count against the wishes. In float64, returned as `weight_OI`'s dtype.
    """
    keys_NI = keys_NI.double()
    spread_II = weight * moment_II.double() + keys_NI.T @ keys_NI
    share_IN = torch.linalg.solve(spread_II, keys_NI.T)
    changed_OI: Tensor = weight_OI.double() + residuals_NO.double().T @ share_IN.T
    return changed_OI.to(weight_OI.dtype)
