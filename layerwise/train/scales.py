"""Packed matrices that can be trained without a byte more: codes stay, scales and zeros move.

The forward pass multiplies with exactly what will be stored: scales rounded to bfloat16 or, where the format stores
them as small integers, to steps of their row's number, which stays. The gradient passes the rounding unchanged. What
is trained is relative, `scale = scale_before * (1 + gain)` and `zero = zero_before + scale_before * shift`, so that
one learning rate suits matrices of any magnitude.
Sources: Chen et al., EfficientQAT, 2024 (arXiv 2407.11062), whose second phase trains the scales of fixed codes;
the straight-through rounding of Bengio et al. 2013 (arXiv 1308.3432).

Shapes: O outputs, I inputs, G groups in a row, g inputs in a group, M rows of x.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layerwise.nets.packed import PackedLinear
from layerwise.nets.row_scales import nearest_value, steps_of


class ScaledLinear(nn.Module):
    """A `PackedLinear` in training: parameters `gain` [O, G], `shift` [O, G] unless symmetric, and `bias`."""

    def __init__(self, packed: PackedLinear) -> None:
        super().__init__()
        self.out_features, self.in_features, self.format = packed.out_features, packed.in_features, packed.format
        middle = 2 ** (self.format.bits - 1)
        codes_OI = packed.unsigned_codes()
        self.register_buffer("codes", (codes_OI.to(torch.int16) - middle).to(torch.int8), persistent=False)
        self.register_buffer("scale", packed.scale.float(), persistent=False)
        self.register_buffer("zero", None if packed.zero is None else packed.zero.float(), persistent=False)
        self.register_buffer("scale_row", self._row(packed.scale, signed=False), persistent=False)
        self.register_buffer("zero_row", self._row(packed.zero, signed=True), persistent=False)
        self.gain = nn.Parameter(torch.zeros_like(packed.scale, dtype=torch.float32))
        self.shift = None if packed.zero is None else nn.Parameter(torch.zeros_like(self.gain))
        self.bias = None if packed.bias is None else nn.Parameter(packed.bias.detach().float())

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    scale_row: Tensor | None
    zero_row: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        zero_OG = self._zero()
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        y: Tensor = _Product.apply(x.to(dtype), self.codes, self._scale(), zero_OG)  # type: ignore[no-untyped-call]
        return y if self.bias is None else y + self.bias

    def packed(self) -> PackedLinear:
        """The layer as it is stored now, with the codes it had."""
        codes_OI = (self.codes[:, : self.in_features].to(torch.int16) + 2 ** (self.format.bits - 1)).to(torch.uint8)
        zero_OG = self._zero()
        bias = None if self.bias is None else self.bias.detach()
        return PackedLinear.from_codes(codes_OI, self._scale().detach(),
                                       None if zero_OG is None else zero_OG.detach(), self.format, bias)

    def _scale(self) -> Tensor:
        return self._as_stored(self.scale * (1 + self.gain), self.scale_row, signed=False)

    def _zero(self) -> Tensor | None:
        if self.zero is None or self.shift is None:
            return None
        return self._as_stored(self.zero + self.scale * self.shift, self.zero_row, signed=True)

    def _row(self, values_OG: Tensor | None, signed: bool) -> Tensor | None:
        """The number of each row in whose steps the format stores values, [O]; None where it stores bfloat16."""
        bits = self.format.scale_bits
        return None if values_OG is None or bits == 16 else steps_of(values_OG, bits, signed)[1]

    def _as_stored(self, values_OG: Tensor, row_O: Tensor | None, signed: bool) -> Tensor:
        """Rounded as the format stores it; the gradient is that of the values."""
        exact_OG = values_OG.detach()
        near_OG = exact_OG.bfloat16().float() if row_O is None else nearest_value(
            exact_OG.T, row_O, self.format.scale_bits, signed).T
        return values_OG + (near_OG - exact_OG)


class _Product(torch.autograd.Function):
    """x w' with w = codes * scale + zero, dequantised again for the backward pass instead of being kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, codes_OI, scale_OG, zero_OG)
        return F.linear(x, _dense(codes_OI, scale_OG, zero_OG, x))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, codes_OI, scale_OG, zero_OG = ctx.saved_tensors
        (y_grad,) = gradients
        y_grad = y_grad.to(x.dtype)
        x_grad = y_grad @ _dense(codes_OI, scale_OG, zero_OG, x) if ctx.needs_input_grad[0] else None
        if not any(ctx.needs_input_grad[2:]):
            return x_grad, None, None, None
        w_grad_OI = y_grad.flatten(0, -2).T @ x.flatten(0, -2)
        w_grad_OGg = F.pad(w_grad_OI, (0, codes_OI.shape[1] - x.shape[-1])).view(*scale_OG.shape, -1)
        scale_grad = (w_grad_OGg * codes_OI.view_as(w_grad_OGg)).sum(-1, dtype=scale_OG.dtype)
        return x_grad, None, scale_grad, None if zero_OG is None else w_grad_OGg.sum(-1, dtype=scale_OG.dtype)


def _dense(codes_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor | None, x: Tensor) -> Tensor:
    """The matrix [O, I] in the dtype of x, rounded once, as `PackedMatrix.dense` gives it."""
    w_OGg = codes_OI.to(scale_OG.dtype).view(*scale_OG.shape, -1) * scale_OG[..., None]
    if zero_OG is not None:
        w_OGg = w_OGg + zero_OG[..., None]
    return w_OGg.view_as(codes_OI)[:, : x.shape[-1]].to(x.dtype)


def trainable_scales(model: nn.Module) -> list[str]:
    """Put a `ScaledLinear` in the place of every packed linear layer, in place; returns their names.

    Layers whose stored matrix is read by others (experts) stay packed.
    """
    names = []
    for name, module in list(model.named_modules()):
        parent = model.get_submodule(name.rpartition(".")[0])
        if isinstance(module, PackedLinear) and not hasattr(parent, "router"):
            _put(model, name, ScaledLinear(module))
            names.append(name)
    return names


def packed_again(model: nn.Module) -> None:
    """Undo `trainable_scales`, keeping what was learnt."""
    for name, module in list(model.named_modules()):
        if isinstance(module, ScaledLinear):
            _put(model, name, module.packed())


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)
