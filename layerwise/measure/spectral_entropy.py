"""How evenly a layer's tokens fill the directions they could fill, and that along the depth of a model.

With rows of Z centred and scaled to length one, and p the eigenvalues of Z Z' divided by its trace,
S = - sum p log p / log(min(tokens, width)): 0 where all tokens lie on one line, 1 where all directions are used
alike. Reconstructed from descriptions of arXiv 2509.23695.

Shapes: N sequences, K tokens, C width, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def spectral_entropy(states_NKC: Tensor) -> Tensor:
    """S of every sequence, float64 [N]; 0 where all its tokens are equal."""
    z_NKC = states_NKC.double()
    z_NKC = F.normalize(z_NKC - z_NKC.mean(1, keepdim=True), dim=-1)
    tokens, width = z_NKC.shape[1:]
    gram = z_NKC @ z_NKC.transpose(1, 2) if tokens <= width else z_NKC.transpose(1, 2) @ z_NKC
    values_NK = torch.linalg.eigvalsh(gram).clamp(min=0)
    p_NK = values_NK / values_NK.sum(1, keepdim=True).clamp(min=1e-12)
    entropy_N: Tensor = -(p_NK * p_NK.clamp(min=1e-12).log()).sum(1) / math.log(min(tokens, width))
    return entropy_N


def depth_profile(layers: Sequence[Tensor], points: int) -> Tensor:
    """S at `points` equal depths from the first layer to the last, straight between layers, [N, points].

    Models of different depth share columns.
    """
    entropy_LN = torch.stack([spectral_entropy(states) for states in layers])
    if len(entropy_LN) == 1:
        return entropy_LN.expand(points, -1).T
    return F.interpolate(entropy_LN.T[:, None], points, mode="linear", align_corners=True)[:, 0]
