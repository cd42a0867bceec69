"""Half-precision weights as they are stored: in a float32 stream, for processors that are slow in half precision, or in
a stream of bfloat16, for those that multiply pairs of it.

Where the residual stream is float32, weights, and the engine's keys and values in bfloat16, stay as small as they are.

Shapes: O outputs, I inputs, C width.
"""

from __future__ import annotations

import ctypes
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layerwise.nets.attention import Attention
from layerwise.nets.compiled import DTYPES, library
from layerwise.nets.decoder import Block
from layerwise.nets.dense import SLOW
from layerwise.nets.direct import FEW_ROWS, Direct
from layerwise.nets.feed_forward import Experts, FeedForward
from layerwise.nets.native import HALVES, CMatrix, multiplied
from layerwise.nets.norms import RMSNorm


class HalfLinear(Direct):
    """A dense layer whose half-precision weight is read as it is stored, for a CPU.

    Its stream is float32, or bfloat16 as the weight where `may_pair` holds.
    """

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight_OI.detach().contiguous(), requires_grad=False)
        self.out_features, self.in_features = weight_OI.shape
        self.bias_O = None if bias_O is None else bias_O.detach().float()

    @staticmethod
    def fits(weight_OI: Tensor, wide: torch.dtype | None) -> bool:
        """Whether this is the best layer for the weight: in a float32 stream where it is `wide`, else in its own."""
        return may_pair(weight_OI) if wide is None else may_widen(weight_OI.device, weight_OI.dtype)

    @cached_property
    def _struct(self) -> CMatrix:
        return CMatrix.of(self.weight)

    def __getstate__(self) -> dict[str, object]:
        """What a copy takes over: addresses are its own."""
        return {name: value for name, value in vars(self).items() if name not in ("_struct", "many")}

    @property
    def address(self) -> int:
        """Where the C structure of the matrix lies, as long as this object lives."""
        return ctypes.addressof(self._struct)

    @cached_property
    def many(self) -> frozenset[torch.dtype]:
        """Of what dtypes the compiled product takes many rows too: float32, and bfloat16 where it multiplies that."""
        found = library()
        both = found is not None and self.weight.dtype == torch.bfloat16 and bool(found.multiplies_pairs())
        return frozenset(DTYPES) if both else frozenset({torch.float32})

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() > FEW_ROWS * self.in_features and x.dtype not in self.many:
            return F.linear(x, self.weight, None if self.bias_O is None else self.bias_O.to(x.dtype))
        found = library()
        assert found is not None
        return multiplied(found.dense_product, self.address, x, self.out_features, self.bias_O)

    def logits(self, x: Tensor) -> Tensor:
        """The same, for a table that serves as the output head."""
        return self(x)  # type: ignore[no-any-return]


def may_widen(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a float32 stream is the faster one: a CPU slow in `dtype`, with compiled functions."""
    return device.type == "cpu" and dtype in SLOW and dtype in HALVES and library() is not None


def may_pair(weight_OI: Tensor) -> bool:
    """Whether a weight in bfloat16 is best read as it is stored in a stream of bfloat16 as well."""
    found = library() if weight_OI.device.type == "cpu" and weight_OI.dtype == torch.bfloat16 else None
    return found is not None and torch.bfloat16 not in SLOW and bool(found.multiplies_pairs())


def widens(block: nn.Module) -> bool:
    """Whether `prepare` can make the block work on a float32 stream."""
    if not isinstance(block, Block):
        return False
    bodies = [branch.body for branch in (block.attention, block.feed_forward) if branch is not None]
    return all(isinstance(body, Attention | FeedForward | Experts) for body in bodies)


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
