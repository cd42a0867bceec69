"""Blocks laid out for fast inference: matrices that read the same input as one, all in a kernel's own layout.

The decoder stays the same; only its modules are exchanged. Results are the same bits as those of the modules they
stand for, up to a matrix product's order of summation; only compiled functions (`compiled.py`) round what is multiplied
with packed matrices to fixed point, as `native.c` says. Where the processor is slow in half precision, blocks can be
made `wide`: see `wide.py`.

Shapes: O outputs, I inputs.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from layerwise.nets.attend import HeadNorms, Pages
from layerwise.nets.attention import Attention
from layerwise.nets.compiled import DTYPES, library
from layerwise.nets.decoder import Block, Branch, shallow
from layerwise.nets.dense import Dense
from layerwise.nets.direct import (
    Direct,
    DirectAttention,
    DirectFeedForward,
    FastRMSNorm,
    LaidOutLinear,
    NativeRMSNorm,
    PrepackedLinear,
)
from layerwise.nets.feed_forward import Experts, FeedForward
from layerwise.nets.flow import Flow
from layerwise.nets.native import NativeMatrix
from layerwise.nets.norms import RMSNorm
from layerwise.nets.packed import PackedLinear
from layerwise.nets.step import Step, through
from layerwise.nets.wide import HalfLinear, Narrow, WideRMSNorm

M = TypeVar("M", bound=nn.Module)


class DirectBlock(Direct, Block):
    """A block without hooks; `step`, where it has one, takes tokens through all of it in one call."""

    step: Step | None = None

    def passed(self, x_BTC: Tensor, flow: Flow, layer: int) -> tuple[Step, Pages] | None:
        """What `through` needs to take these hidden states through the block; None where it cannot."""
        if self.step is None or not self.step.takes(x_BTC):
            return None
        pages = flow.pages(self.step.attention, layer, x_BTC.dtype)
        return None if pages is None else (self.step, pages)

    def forward(self, x_BTC: Tensor, flow: Flow, layer: int) -> Tensor:
        passed = self.passed(x_BTC, flow, layer)
        return super().forward(x_BTC, flow, layer) if passed is None else through([passed], x_BTC[0])[None]


class DirectBranch(Direct, Branch):
    """Half a block without hooks."""


DIRECT: dict[type[nn.Module], type[nn.Module]] = {
    Block: DirectBlock, Branch: DirectBranch, Attention: DirectAttention, FeedForward: DirectFeedForward}


def prepare(block: Block, wide: torch.dtype | None = None) -> Block:
    """A copy of `block` for inference only: its parts are joined and laid out, its hooks left out.

    With `wide`, the dtype of the block, it works on a float32 stream.
    """
    new = shallow(block)
    new.attention, new.feed_forward = _branch(block.attention, wide), _branch(block.feed_forward, wide)
    new = _direct(new)
    if isinstance(new, DirectBlock):
        new.step = Step.of(new)
    return new


def _direct(module: M) -> M:
    """The module itself, from now on without hooks and with its children at hand as plain attributes."""
    module.__class__ = DIRECT.get(type(module), type(module))  # type: ignore[assignment]
    vars(module).update(module._modules)
    return module


def prepare_norm(norm: nn.Module, wide: torch.dtype | None = None) -> nn.Module:
    """The norm itself, or one that is faster for few tokens."""
    if not isinstance(norm, RMSNorm):
        return norm if wide is None else copy.deepcopy(norm).float()
    many = norm if wide is None else WideRMSNorm(norm)
    if norm.weight.device.type == "cpu" and norm.weight.dtype in DTYPES and library() is not None:
        return NativeRMSNorm(norm, many)
    return FastRMSNorm(norm) if wide is None and norm.offset == 0.0 else many


def prepare_linear(linear: nn.Module, wide: torch.dtype | None = None) -> nn.Module:
    """The layer itself, or one in a better layout."""
    if isinstance(linear, Dense):
        if HalfLinear.fits(linear.weight, wide):
            return HalfLinear(linear.weight, linear.bias)
        if PrepackedLinear.fits(linear.weight):
            return PrepackedLinear(linear.weight, linear.bias)
    if isinstance(linear, PackedLinear) and (wide is not None or isinstance(linear.lay_out(), NativeMatrix)):
        return LaidOutLinear(linear)
    return linear if wide is None else Narrow(linear, wide)


def _branch(branch: Branch | None, wide: torch.dtype | None) -> Branch | None:
    if branch is None:
        return None
    new = shallow(branch)
    new.norm = prepare_norm(branch.norm, wide)
    if new.post_norm is not None:
        new.post_norm = prepare_norm(new.post_norm, wide)
    new.body = shallow(branch.body)
    if isinstance(new.body, Experts):
        new.body = new.body if wide is None else Narrow(new.body, wide)
        return _direct(new)
    if isinstance(new.body, Attention):
        _join(new.body, "qkv", ("q", "k", "v"), wide)
    if isinstance(new.body, FeedForward):
        _join(new.body, "gate_up", ("gate", "up"), wide)
    for name, child in list(new.body.named_children()):
        if isinstance(child, RMSNorm | nn.LayerNorm):
            setattr(new.body, name, prepare_norm(child, wide))
        else:
            setattr(new.body, name, prepare_linear(child, wide))
    _direct(new.body)
    if isinstance(new.body, DirectAttention):
        new.body.norms = _head_norms(new.body)
    return _direct(new)


def _head_norms(attention: Attention) -> HeadNorms | None:
    """The norms of queries and keys for the compiled function; None where there are none, or of another kind."""
    q, k = (attention._modules.get(name) for name in ("q_norm", "k_norm"))
    if not isinstance(q, NativeRMSNorm) or not isinstance(k, NativeRMSNorm):
        return None
    return HeadNorms(q.weight, k.weight, q.eps)


def _join(body: nn.Module, name: str, parts: Sequence[str], wide: torch.dtype | None) -> None:
    """Make one layer of several that read the same input, where all are stored alike and are copied anyway."""
    layers = [getattr(body, part, None) for part in parts]
    if wide is not None and any(isinstance(layer, Dense) for layer in layers):
        return
    joined = _stacked([layer for layer in layers if layer is not None]) if all(layers) else None
    if joined is not None:
        for part in parts:
            del body._modules[part]
        body.add_module(name, joined)


def _stacked(layers: list[nn.Module]) -> nn.Module | None:
    first = layers[0]
    biases = [layer.bias for layer in layers]
    if len({bias is None for bias in biases}) > 1:
        return None
    bias_O = None if biases[0] is None else torch.cat([bias for bias in biases if isinstance(bias, Tensor)])
    if all(isinstance(layer, Dense) for layer in layers):
        weight_OI = torch.cat([layer.weight for layer in layers])  # type: ignore[misc]
        joined = Dense(1, 1, bias=bias_O is not None)
        joined.out_features, joined.in_features = weight_OI.shape
        joined.weight = nn.Parameter(weight_OI, requires_grad=False)
        joined.bias = None if bias_O is None else nn.Parameter(bias_O, requires_grad=False)
        return joined
    if all(isinstance(layer, PackedLinear) and layer.format == first.format for layer in layers):
        return PackedLinear.stacked(layers, bias_O)  # type: ignore[arg-type]
    return None
