"""The cloud of states after each layer: against all tokens, and the sample that keeps memory small."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from layerwise.errors import BadOption
from layerwise.measure.engine import measure
from layerwise.measure.manifold import Cloud, Manifold, keys
from layerwise.measure.neighbours import deviation, participation_ratio, two_nn
from layerwise.stack.decoder import DecoderStack


def test_it_equals_the_shape_of_all_tokens(stack: DecoderStack, tokens_NT: Tensor) -> None:
    with stack.capture("output") as seen:
        stack(tokens_NT)
    found = measure(stack, tokens_NT, "manifold", batch=2, progress=False)
    for layer in range(len(stack)):
        points = seen[layer, "output"].flatten(0, 1).double()
        spread = (points - points.mean(0)).square().sum(1).mean().sqrt()
        near = deviation(points, points, 5, inside=True).mean() / spread
        assert found["manifold:intrinsic-dimension"].values[layer] == pytest.approx(two_nn(points), rel=1e-4)
        assert found["manifold:participation-ratio"].values[layer] == pytest.approx(
            participation_ratio(points), rel=1e-5)
        assert found["manifold:neighbour-distance"].values[layer] == pytest.approx(float(near), rel=1e-5)


def test_a_full_sample_is_the_same_in_any_order_and_in_parts() -> None:
    points = torch.randn(100, 8, generator=torch.Generator().manual_seed(0))
    at_once = Cloud().joined(keys(points), points, 20)
    back = points.flip(0)
    parts = Cloud().joined(keys(back[:30]), back[:30], 20).joined(keys(back[30:]), back[30:], 20)
    assert torch.equal(at_once.points_PC, parts.points_PC)
    assert len(at_once.points_PC) == 20


def test_keys_are_even_and_blind_to_length() -> None:
    points = torch.randn(20000, 16, generator=torch.Generator().manual_seed(0))
    found = keys(points)
    assert torch.histc(found.float(), 10, 0, 1).tolist() == pytest.approx([2000] * 10, rel=0.12)
    assert torch.allclose(keys(points * 4), found, atol=1e-6)


def test_a_small_sample_does_not_depend_on_batches_and_order(stack: DecoderStack, tokens_NT: Tensor) -> None:
    instrument = Manifold(points=10, k=2)
    found = measure(stack, tokens_NT, [instrument], batch=2, progress=False)
    again = measure(stack, tokens_NT.flip(0), [instrument], batch=1, progress=False)
    for column in instrument.columns():
        assert found[column].values == pytest.approx(again[column].values, rel=1e-4)
        assert all(value > 0 for value in found[column].values)


def test_too_few_tokens_measure_nothing(stack: DecoderStack, tokens_NT: Tensor) -> None:
    found = measure(stack, tokens_NT[:1, :4], "manifold", progress=False)
    assert all(math.isnan(value) for value in found["manifold:intrinsic-dimension"].values)


def test_impossible_parameters_are_refused(stack: DecoderStack, tokens_NT: Tensor) -> None:
    with pytest.raises(BadOption, match="k < points"):
        measure(stack, tokens_NT, [Manifold(points=3, k=3)], progress=False)
