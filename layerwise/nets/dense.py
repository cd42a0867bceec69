"""Products with dense matrices, at full speed also where the processor is slow in half precision.

Without instructions for it torch multiplies bfloat16 and float16 some six times slower than float32. Intel's AVX-512
has instructions for bfloat16, but runs them at half the speed of float32 where its matrix unit (AMX) is missing or
hidden from a virtual machine. There, products of many rows run in float32, part by part, and are rounded once at the
end, as in the instructions: in C where nothing but the numbers is asked for (`dense.c`), else by torch. Few rows stay:
reading the matrix is then what takes time, and half precision is half as much to read.

Shapes: O outputs, I inputs.
"""

from __future__ import annotations

import ctypes
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layerwise.nets.compiled import library
from layerwise.nets.native import HALVES, CMatrix, multiplied

WITHOUT, HALF_SPEED = 8, 48
"""Rows from which widening the matrix first takes less time: without instructions, and with those of half speed."""

PART = 1 << 22
"""Numbers of a matrix that are widened at a time."""


CAN: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
"""What this processor has instructions for, as torch knows it."""


def _slow() -> dict[torch.dtype, int]:
    known = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    found = {dtype: WITHOUT for dtype, name in known.items() if not getattr(torch.ops.mkldnn, name, lambda: True)()}
    if CAN.get("avx512_bf16") and not CAN.get("amx_bf16") and "Intel" in CAN.get("cpu_name", ""):
        found.setdefault(torch.bfloat16, HALF_SPEED)
    return found


SLOW = _slow()
"""The dtypes that this processor multiplies slower than float32, and from how many rows float32 is worth it."""


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
    if not SLOW or x.device.type != "cpu":
        return F.linear(x, weight_OI, bias_O)
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    if dtype not in SLOW or x.numel() < SLOW[dtype] * x.shape[-1]:
        return F.linear(x, weight_OI, bias_O)
    with torch.autocast("cpu", enabled=False):
        found = library()
        if found is not None and weight_OI.dtype in HALVES and weight_OI.is_contiguous() and _unseen():
            matrix, bias_O = CMatrix.of(weight_OI), None if bias_O is None else bias_O.float()
            address, outputs = ctypes.addressof(matrix), len(weight_OI)
            return multiplied(found.dense_product, address, x.float(), outputs, bias_O).to(dtype)
        return widened(x, weight_OI, bias_O, dtype)


def _unseen() -> bool:
    """Whether torch need not see the product: nothing is differentiated, counted or mapped over."""
    return (torch.is_inference_mode_enabled() and not torch._C._len_torch_dispatch_stack()
            and torch._C._functorch.maybe_current_level() is None)


def widened(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x w' + b in float32, a part of the matrix at a time, given as `dtype`."""
    x, step = x.float(), max(1, PART // weight_OI.shape[1])
    if len(weight_OI) <= step:
        return F.linear(x, weight_OI.float(), None if bias_O is None else bias_O.float()).to(dtype)
    weights, biases = weight_OI.split(step), [None] * len(weight_OI) if bias_O is None else bias_O.split(step)
    return torch.cat([F.linear(x, w_OI.float(), None if b_O is None else b_O.float()).to(dtype)
                      for w_OI, b_O in zip(weights, biases, strict=False)], -1)
