"""Half-precision weights in a float32 stream, for processors without instructions for half precision.

The residual stream and the caches are float32, and weights stay as small as they are.

Shapes: O outputs, I inputs, C width.
"""

from __future__ import annotations

import warnings
from functools import cache

import torch
from torch import Tensor, nn

from layerwise.nets.attention import Attention
from layerwise.nets.decoder import Block
from layerwise.nets.dense import SLOW
from layerwise.nets.dense import linear as multiply
from layerwise.nets.direct import Direct
from layerwise.nets.feed_forward import Experts, FeedForward
from layerwise.nets.norms import RMSNorm


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
