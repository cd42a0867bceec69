"""Block influence: facts known by hand, a float64 loop, and what must not matter."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from layerwise.errors import BadModel
from layerwise.measure.block_influence import influence
from layerwise.measure.engine import measure
from layerwise.stack.base import Skip
from layerwise.stack.decoder import DecoderStack


class Negate(nn.Module):
    def forward(self, x: Tensor, *shared: object) -> Tensor:
        return -x


class Broken(nn.Module):
    def forward(self, x: Tensor, *shared: object) -> Tensor:
        return x * torch.where(x > x.mean(), 1.0, math.nan)


def scores(stack: DecoderStack, tokens_NT: Tensor, batch: int = 2) -> tuple[float, ...]:
    return measure(stack, tokens_NT, "block-influence", batch=batch, progress=False)["block-influence"].values


def test_formula() -> None:
    assert influence(torch.tensor([1.0, 0.0, -1.0])).tolist() == [0, 1, 2]


def test_identity_layer_scores_zero(stack: DecoderStack, tokens_NT: Tensor) -> None:
    with stack.swap(1, Skip()):
        assert scores(stack, tokens_NT)[1] == 0


def test_negating_layer_scores_two(stack: DecoderStack, tokens_NT: Tensor) -> None:
    with stack.swap(2, Negate()):
        assert scores(stack, tokens_NT)[2] == 2


def test_matches_float64_loop(stack: DecoderStack, tokens_NT: Tensor, trace: object) -> None:
    expected = []
    for x_BTC, y_BTC in zip(trace.inputs, trace.outputs, strict=True):  # type: ignore[attr-defined]
        values = [1 - float(x @ y) / math.sqrt(float(x @ x) * float(y @ y))
                  for x, y in zip(x_BTC.flatten(0, 1), y_BTC.flatten(0, 1), strict=True)]
        expected.append(math.fsum(values) / len(values))
    assert scores(stack, tokens_NT) == pytest.approx(expected, abs=1e-6)  # float32 activations and products


def test_batching_order_and_padding_do_not_matter(stack: DecoderStack, tokens_NT: Tensor) -> None:
    expected = scores(stack, tokens_NT)
    filled_NT = torch.cat([tokens_NT.flip(0), torch.full((5, 7), 3)], 1)
    mask_NT = torch.arange(23).expand(5, 23) < 16
    assert scores(stack, tokens_NT, batch=5) == pytest.approx(expected, abs=1e-6)
    padded = measure(stack, [(filled_NT, mask_NT)], "block-influence", progress=False)
    assert padded["block-influence"].values == pytest.approx(expected, abs=1e-6)


def test_nan_names_the_layer_and_the_batch(stack: DecoderStack, tokens_NT: Tensor) -> None:
    with stack.swap(2, Broken()), pytest.raises(BadModel, match=r"after layer 2 .* batch 0"):
        scores(stack, tokens_NT)


def test_a_zero_vector_says_nothing(stack: DecoderStack, tokens_NT: Tensor) -> None:
    class Zero(nn.Module):
        def forward(self, x: Tensor, *shared: object) -> Tensor:
            return x * 0

    with stack.swap(3, Zero()):
        assert math.isnan(scores(stack, tokens_NT)[3])
