"""Products with dense matrices, at full speed also where the processor has no instructions for half precision.

Without them torch multiplies bfloat16 and float16 some six times slower than float32. There, products of many rows
run in float32, part by part, and are rounded once at the end, as in the instructions that are missing. Few rows stay:
reading the matrix is then what takes time, and half precision is half as much to read.

Shapes: O outputs, I inputs.
"""

from __future__ import annotations

from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MANY = 8
"""Rows from which widening the matrix first takes less time than multiplying it as it is."""

PART = 1 << 22
"""Numbers of a matrix that are widened at a time."""


def _slow() -> frozenset[torch.dtype]:
    known = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    fast = {dtype for dtype, name in known.items() if getattr(torch.ops.mkldnn, name, lambda: True)()}
    return frozenset(known) - fast


SLOW = _slow()
"""The dtypes that this processor cannot multiply by itself."""


class Dense(nn.Linear):
    """`nn.Linear` by way of `linear`."""

    @classmethod
    def of(cls, weight_OI: Tensor, bias_O: Tensor | None = None) -> Self:
        """A layer that holds these numbers and trains none."""
        layer = cls(weight_OI.shape[1], len(weight_OI), bias=False, device="meta")
        layer.weight = nn.Parameter(weight_OI.detach(), requires_grad=False)
        if bias_O is not None:
            layer.bias = nn.Parameter(bias_O.detach(), requires_grad=False)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """x w' + b, [..., I] to [..., O], in x's dtype, or autocast's."""
    if not SLOW or x.device.type != "cpu" or x.numel() < MANY * x.shape[-1]:
        return F.linear(x, weight_OI, bias_O)
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    if dtype not in SLOW:
        return F.linear(x, weight_OI, bias_O)
    with torch.autocast("cpu", enabled=False):
        return widened(x, weight_OI, bias_O, dtype)


def widened(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x w' + b in float32, a part of the matrix at a time, given as `dtype`."""
    x, step = x.float(), max(1, PART // weight_OI.shape[1])
    if len(weight_OI) <= step:
        return F.linear(x, weight_OI.float(), None if bias_O is None else bias_O.float()).to(dtype)
    weights, biases = weight_OI.split(step), [None] * len(weight_OI) if bias_O is None else bias_O.split(step)
    return torch.cat([F.linear(x, w_OI.float(), None if b_O is None else b_O.float()).to(dtype)
                      for w_OI, b_O in zip(weights, biases, strict=False)], -1)
