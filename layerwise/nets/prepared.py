"""Blocks laid out for fast inference: matrices that read the same input as one, dense ones in a kernel's own layout.

The decoder stays the same; only its modules are exchanged. Results are the same bits as those of the modules they
stand for, up to a matrix product's order of summation. Where the processor has no instructions for half precision,
blocks can be made `wide`: the residual stream and the caches are float32, and weights stay as small as they are.

Shapes: O outputs, I inputs, C width, N tokens.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from functools import cache
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layerwise.nets.attention import Attention
from layerwise.nets.decoder import Block, Branch, shallow
from layerwise.nets.dense import SLOW, Dense
from layerwise.nets.dense import linear as multiply
from layerwise.nets.feed_forward import Experts, FeedForward
from layerwise.nets.norms import RMSNorm
from layerwise.nets.packed import PackedEmbedding, PackedLinear

M = TypeVar("M", bound=nn.Module)

FEW_TOKENS = 16
"""Up to this many tokens one fused kernel on twice the width is faster than the five of the plain norm."""

MANY_TOKENS = 48
"""Above this a packed layer's product is a dense one anyway, which then need not be rounded."""


class Direct(nn.Module):
    """A module without hooks: a call is its `forward`, which saves as much time as a small product takes."""

    def __call__(self, *arguments: Any) -> Any:
        return self.forward(*arguments)


class DirectBlock(Direct, Block):
    """A block without hooks."""


class DirectBranch(Direct, Branch):
    """Half a block without hooks."""


class DirectAttention(Direct, Attention):
    """Attention without hooks."""


class DirectFeedForward(Direct, FeedForward):
    """A feed-forward network without hooks."""


DIRECT: dict[type[nn.Module], type[nn.Module]] = {
    Block: DirectBlock, Branch: DirectBranch, Attention: DirectAttention, FeedForward: DirectFeedForward}


class PrepackedLinear(Direct):
    """A dense linear layer whose weight lies as oneDNN wants it; bfloat16 on a CPU, nothing is differentiated.

    Reading the weight of one token's product takes half the time that it takes from the plain layout.
    """

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight_OI.shape
        self.bias = bias_O
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight_OI.detach().contiguous(), None)

    @staticmethod
    def fits(weight_OI: Tensor) -> bool:
        """Whether this machine and build of torch have the layout for the weight."""
        return (weight_OI.dtype == torch.bfloat16 and weight_OI.device.type == "cpu"
                and torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")  # type: ignore[no-any-return]

    def logits(self, x: Tensor) -> Tensor:
        """The same, for a table that serves as the output head."""
        return self(x)  # type: ignore[no-any-return]


class Float16Linear(Direct):
    """A dense layer in a float32 stream whose weight lies in float16 as FBGEMM wants it, for a CPU.

    A token's product takes two thirds of the time of torch's bfloat16 one on AVX2, that of 4 to 16 tokens a quarter.
    bfloat16 numbers are kept exactly down to 6e-5; the error of smaller ones is below 3e-8.
    """

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight_OI.shape
        self.bias = None if bias_O is None else bias_O.detach().float()
        self.packed = torch.fbgemm_pack_gemm_matrix_fp16(weight_OI.detach().float().contiguous())

    @staticmethod
    def fits(weight_OI: Tensor) -> bool:
        """Whether the weight is on a CPU that only multiplies wider numbers, and its range is that of float16."""
        if not may_widen(weight_OI.device, weight_OI.dtype):
            return False
        least, most = map(float, torch.aminmax(weight_OI.detach()))
        return 2**-8 <= max(-least, most) < 2**15

    def forward(self, x: Tensor) -> Tensor:
        return torch.fbgemm_linear_fp16_weight_fp32_activation(x, self.packed, self.bias)

    def logits(self, x: Tensor) -> Tensor:
        """The same, for a table that serves as the output head."""
        return self(x)  # type: ignore[no-any-return]


def may_widen(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a float32 stream is the faster one: a CPU that cannot multiply `dtype` but has FBGEMM's kernels."""
    return device.type == "cpu" and dtype in SLOW and _has_float16_kernel()


def widens(block: nn.Module) -> bool:
    """Whether `prepare` can make the block work on a float32 stream."""
    if not isinstance(block, Block):
        return False
    bodies = [branch.body for branch in (block.attention, block.feed_forward) if branch is not None]
    return all(isinstance(body, Attention | FeedForward | Experts) for body in bodies)


@cache
def _has_float16_kernel() -> bool:
    """Torch calls the kernel deprecated, once; the one that is to replace it takes 40 microseconds more a call."""
    try:
        with warnings.catch_warnings(action="ignore"):
            one = torch.ones(1, 16)
            packed = torch.fbgemm_pack_gemm_matrix_fp16(one)
            return bool(torch.fbgemm_linear_fp16_weight_fp32_activation(one, packed, None) == 16)
    except (AttributeError, RuntimeError, NotImplementedError):
        return False


class Narrow(Direct):
    """A layer of half precision in a float32 stream."""

    def __init__(self, inner: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.inner, self.dtype = inner, dtype

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.to(self.dtype)).float()  # type: ignore[no-any-return]

    def logits(self, x: Tensor) -> Tensor:
        """The same, for a table that serves as the output head."""
        return self.inner.logits(x.to(self.dtype)).float()  # type: ignore[no-any-return, operator]


class NarrowPacked(Direct):
    """A packed matrix in a float32 stream: its kernel reads few rows as bfloat16, many stay as they are."""

    def __init__(self, inner: PackedLinear | PackedEmbedding) -> None:
        super().__init__()
        self.inner = inner
        bias = inner.bias if isinstance(inner, PackedLinear) else None
        self.bias_O = None if bias is None else bias.detach().float()

    def forward(self, x: Tensor) -> Tensor:
        inner = self.inner
        x_MI = x.reshape(-1, inner.in_features)
        if len(x_MI) > MANY_TOKENS:
            y_MO = inner.product(x_MI)
        else:  # most layers have been laid out before, and what finds that out takes as long as a small product
            x_MI, tiled = x_MI.to(torch.bfloat16), inner.tiled
            y_MO = (inner.product(x_MI) if tiled is None else tiled.product(x_MI)).float()
        if self.bias_O is not None:
            y_MO = y_MO + self.bias_O
        return y_MO.view(*x.shape[:-1], inner.out_features)

    def logits(self, x: Tensor) -> Tensor:
        """The same, for a table that serves as the output head."""
        return self(x)  # type: ignore[no-any-return]


class TableHead(nn.Module):
    """A dense token table as the output head."""

    def __init__(self, table: nn.Embedding) -> None:
        super().__init__()
        self.table = table

    def logits(self, x: Tensor) -> Tensor:
        """x w', [..., vocabulary]."""
        return multiply(x, self.table.weight)


class WideEmbedding(nn.Module):
    """A token table whose rows enter a float32 stream."""

    def __init__(self, table: nn.Module) -> None:
        super().__init__()
        self.table = table

    def forward(self, tokens: Tensor) -> Tensor:
        return self.table(tokens).float()  # type: ignore[no-any-return]


class WideRMSNorm(Direct):
    """RMS norm in float32 as x w / hypot(|x|, sqrt(C eps)): four kernels without copies."""

    def __init__(self, norm: RMSNorm) -> None:
        super().__init__()
        width = len(norm.weight)
        self.weight = nn.Parameter((norm.weight.detach().float() + norm.offset) * width**0.5, requires_grad=False)
        self.register_buffer("floor", torch.tensor((norm.eps * width) ** 0.5), persistent=False)
        vars(self).update(self._parameters, **self._buffers)

    def forward(self, x: Tensor) -> Tensor:
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return torch.mul(x, self.weight).div_(torch.hypot(size, self.floor))  # type: ignore[arg-type]


class FastRMSNorm(Direct):
    """RMS norm of few tokens as the layer norm of [x, -x], whose mean is zero and whose variance is the mean square."""

    def __init__(self, norm: RMSNorm) -> None:
        super().__init__()
        self.norm = norm
        self.width = len(norm.weight)
        self.twice = torch.cat([norm.weight, norm.weight]).detach()
        self.shape = (2 * self.width,)

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() > FEW_TOKENS * self.width:
            return self.norm(x)  # type: ignore[no-any-return]
        both = F.layer_norm(torch.cat([x, -x], -1), self.shape, self.twice, None, self.norm.eps)
        return both[..., : self.width].contiguous()


def prepare(block: Block, wide: torch.dtype | None = None) -> Block:
    """A copy of `block` for inference only: its parts are joined and laid out, its hooks left out.

    With `wide`, the dtype of the block, it works on a float32 stream.
    """
    new = shallow(block)
    new.attention, new.feed_forward = _branch(block.attention, wide), _branch(block.feed_forward, wide)
    return _direct(new)


def _direct(module: M) -> M:
    """The module itself, from now on without hooks and with its children at hand as plain attributes."""
    module.__class__ = DIRECT.get(type(module), type(module))  # type: ignore[assignment]
    vars(module).update(module._modules)
    return module


def prepare_norm(norm: nn.Module, wide: torch.dtype | None = None) -> nn.Module:
    """The norm itself, or one that is faster for few tokens."""
    if wide is not None:
        return WideRMSNorm(norm) if isinstance(norm, RMSNorm) else copy.deepcopy(norm).float()
    return FastRMSNorm(norm) if isinstance(norm, RMSNorm) and norm.offset == 0.0 else norm


def prepare_linear(linear: nn.Module, wide: torch.dtype | None = None) -> nn.Module:
    """The layer itself, or one in a better layout."""
    if isinstance(linear, Dense):
        if wide is not None and Float16Linear.fits(linear.weight):
            return Float16Linear(linear.weight, linear.bias)
        if PrepackedLinear.fits(linear.weight):
            return PrepackedLinear(linear.weight, linear.bias)
    if wide is None:
        return linear
    return NarrowPacked(linear) if isinstance(linear, PackedLinear) else Narrow(linear, wide)


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
        _join(new.body, "qkv", ("q", "k", "v"))
    if isinstance(new.body, FeedForward):
        _join(new.body, "gate_up", ("gate", "up"))
    for name, child in list(new.body.named_children()):
        if isinstance(child, RMSNorm | nn.LayerNorm):
            setattr(new.body, name, child if wide is None else prepare_norm(child, wide))
        else:
            setattr(new.body, name, prepare_linear(child, wide))
    _direct(new.body)
    return _direct(new)


def _join(body: nn.Module, name: str, parts: Sequence[str]) -> None:
    """Make one layer of several that read the same input, where all are stored alike."""
    layers = [getattr(body, part, None) for part in parts]
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
