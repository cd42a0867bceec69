"""A matrix stored as the product of two smaller ones, and the choice among the three ways to store a matrix.

Shapes: O outputs, I inputs, R rank.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from layerwise.nets.dense import Dense
from layerwise.nets.packed import PackedLinear
from layerwise.spec import Format

Factor = nn.Linear | PackedLinear


class FactoredLinear(nn.Module):
    """y = b(a(x)): `a` [R, I] and `b` [O, R], dense or packed; the bias, if there is one, is that of `b`."""

    def __init__(self, a: Factor, b: Factor) -> None:
        super().__init__()
        self.a, self.b = a, b

    @property
    def in_features(self) -> int:
        return self.a.in_features

    @property
    def out_features(self) -> int:
        return self.b.out_features

    @property
    def rank(self) -> int:
        return self.a.out_features

    @property
    def bias(self) -> Tensor | None:
        return self.b.bias

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The product as numbers, [O, I]."""
        return (weights(self.b, dtype) @ weights(self.a, dtype)).detach()

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, rank {self.rank}"


Matrix = Factor | FactoredLinear
"""A linear layer of a block, however it is stored."""


def weights(factor: Factor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The numbers of a dense or packed linear layer, [O, I]."""
    return factor.dense(dtype) if isinstance(factor, PackedLinear) else factor.weight.to(dtype)


def build_linear(outputs: int, inputs: int, bias: bool, format: Format | None = None,
                 rank: int | None = None) -> Matrix:
    """A layer to be filled from a checkpoint: dense or in `format`; in two factors where a rank is given."""
    if rank is not None:
        return FactoredLinear(_factor(rank, inputs, False, format), _factor(outputs, rank, bias, format))
    return _factor(outputs, inputs, bias, format)


def _factor(outputs: int, inputs: int, bias: bool, format: Format | None) -> Factor:
    return PackedLinear.empty(outputs, inputs, format, bias) if format else Dense(inputs, outputs, bias)
