"""Layers laid out for fast inference: without hooks, their weights as a kernel of this processor reads them.

Shapes: O outputs, I inputs, M rows of x.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layerwise.nets import native
from layerwise.nets.attend import HeadNorms, attend
from layerwise.nets.attention import Attention
from layerwise.nets.compiled import DTYPES, library
from layerwise.nets.feed_forward import FeedForward
from layerwise.nets.flow import Flow
from layerwise.nets.norms import RMSNorm
from layerwise.nets.packed import PackedEmbedding, PackedLinear

FEW_TOKENS = 16
"""Up to this many tokens one kernel on one core is faster than the five of the plain norm."""

FEW_ROWS = 48
"""Above this a product that the compiled functions are not made for is torch's, with a dense matrix."""


class Direct(nn.Module):
    """A module without hooks: a call is its `forward`, which saves as much time as a small product takes."""

    def __call__(self, *arguments: Any) -> Any:
        return self.forward(*arguments)


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


class LaidOutLinear(Direct):
    """A packed matrix in the layout of its kernel, in the dtype of the stream, float32 or bfloat16."""

    def __init__(self, inner: PackedLinear | PackedEmbedding) -> None:
        super().__init__()
        self.inner, self.tiled = inner, inner.lay_out()
        self.in_features, self.out_features = inner.in_features, inner.out_features
        bias = inner.bias if isinstance(inner, PackedLinear) else None
        self.bias_O = None if bias is None else bias.detach().float()
        self.many = self.tiled.many if isinstance(self.tiled, native.NativeMatrix) else frozenset[torch.dtype]()

    def forward(self, x: Tensor) -> Tensor:
        x_MI, tiled = x.reshape(-1, self.in_features), self.tiled
        if tiled is None or (x_MI.shape[0] > FEW_ROWS and x.dtype not in self.many):
            y_MO = self.inner.product(x_MI)
        elif isinstance(tiled, native.NativeMatrix):
            return tiled.product(x_MI, self.bias_O).view(*x.shape[:-1], self.out_features)
        else:
            y_MO = tiled.product(x_MI.to(torch.bfloat16)).to(x.dtype)
        y_MO = y_MO if self.bias_O is None else (y_MO + self.bias_O).to(x.dtype)
        return y_MO.view(*x.shape[:-1], self.out_features)

    def logits(self, x: Tensor) -> Tensor:
        """The same, for a table that serves as the output head."""
        return self(x)  # type: ignore[no-any-return]


class NativeRMSNorm(Direct):
    """RMS norm of few tokens in one call; `inner` norms many, and its parameters have the dtype of the stream."""

    weight: Tensor

    def __init__(self, norm: RMSNorm, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.eps, self.few = inner, norm.eps, FEW_TOKENS * len(norm.weight)
        self.register_buffer("weight", norm.weight.detach().float() + norm.offset, persistent=False)
        vars(self).update(self._buffers, **self._modules)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) if x.numel() > self.few else native.rms_norm(x, self.weight, self.eps)


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


class DirectFeedForward(Direct, FeedForward):
    """A feed-forward network without hooks; the step between its products is one call where there is one for it."""

    def forward(self, x: Tensor) -> Tensor:
        joined = self._modules.get("gate_up")
        few = x.numel() <= FEW_TOKENS * x.shape[-1] and x.dtype in DTYPES and x.device.type == "cpu"
        if joined is None or not few or self.spec.activation not in native.ACTIVATIONS or library() is None:
            return super().forward(x)
        return self.down(native.gate_times(joined(x), self.spec.activation))  # type: ignore[no-any-return]


class DirectAttention(Direct, Attention):
    """Attention without hooks; where the flow can, all between its products is one call."""

    norms: HeadNorms | None = None

    @property
    def known(self) -> bool:
        """Whether the compiled function can do it: with keys of its own, and norms of its kind or none."""
        return self.spec.shares is None and (self.norms is not None or not self.spec.qk_norm)

    def forward(self, x_BTC: Tensor, flow: Flow, layer: int) -> Tensor:
        pages = flow.pages(self.spec, layer, x_BTC.dtype) if self.known else None
        if pages is None:
            return super().forward(x_BTC, flow, layer)
        joined = self._modules.get("qkv")
        qkv_BTA = torch.cat([self.q(x_BTC), self.k(x_BTC), self.v(x_BTC)], -1) if joined is None else joined(x_BTC)
        return self.o(attend(qkv_BTA[0], pages, self.norms)[None])  # type: ignore[no-any-return]
