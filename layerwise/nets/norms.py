"""Normalisation layers, built from a `Norm` spec."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layerwise import spec


class RMSNorm(nn.Module):
    """x / rms(x) * (offset + weight), computed in float32 where the offset is not zero (Gemma's convention)."""

    def __init__(self, width: int, eps: float, offset: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps, self.offset = eps, offset

    def forward(self, x: Tensor) -> Tensor:
        if self.offset == 0.0:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        scaled = F.rms_norm(x.float(), self.weight.shape, self.weight.float() + self.offset, self.eps)
        return scaled.to(x.dtype)


def build_norm(norm: spec.Norm, width: int) -> nn.Module:
    """The module for `norm` over the last axis of size `width`."""
    return nn.LayerNorm(width, norm.eps) if norm.kind == "layer" else RMSNorm(width, norm.eps, norm.offset)
