"""What weights alone say: magnitudes and the z-score distribution."""

from __future__ import annotations

import math

import pytest
import torch

from layerwise.measure.engine import measure
from layerwise.measure.weight_magnitude import magnitude
from layerwise.measure.zd import ZScoreDistribution, share_beyond
from layerwise.spec import Format
from layerwise.stack.decoder import DecoderStack
from layerwise.transform.quantize import Quantize


def test_magnitude_known_by_hand() -> None:
    weight = torch.tensor([[1.0, -2.0], [3.0, 0.0]], dtype=torch.bfloat16)
    assert magnitude(weight, 1) == 6
    assert magnitude(weight, 2) == 14


def test_magnitudes_are_sums_over_every_tensor(stack: DecoderStack) -> None:
    found = measure(stack, None, ["weight-l1", "weight-l2"], progress=False)
    for layer in range(len(stack)):
        tensors = [tensor.double() for tensor in stack.block(layer).state_dict().values()]
        assert found["weight-l1"].values[layer] == pytest.approx(sum(float(t.abs().sum()) for t in tensors))
        assert found["weight-l2"].values[layer] == pytest.approx(sum(float((t * t).sum()) for t in tensors))


def test_packed_weights_count_by_their_values(stack: DecoderStack) -> None:
    quantize = Quantize(4)
    block = quantize.apply(stack.block(0), stack.spec.rows[0])
    expected = sum(float(matrix.dense().double().abs().sum()) for matrix in block.matrices().values())  # type: ignore[operator]
    expected += sum(float(p.double().abs().sum()) for p in block.parameters())
    spec = stack.spec.with_rows({0: quantize.edit(stack.spec.rows[0], stack.spec.hidden)})
    packed = stack.rebuilt(spec, [block, *(stack.block(layer) for layer in range(1, 4))])
    assert spec.rows[0].formats["q"] == Format(4, 32)
    found = measure(packed, None, "weight-l1", progress=False)
    assert found["weight-l1"].values[0] == pytest.approx(expected)


def test_share_beyond_one_deviation() -> None:
    weights = [torch.tensor([[0.0, 0.0, 0.0], [0.0, 4.0, -4.0]])]  # mean 0, deviation sqrt(32 / 6) = 2.3
    assert share_beyond(weights) == pytest.approx(1 / 6)
    assert share_beyond(weights, two_sided=True) == pytest.approx(2 / 6)


def test_gaussian_weights_have_the_gaussian_tail() -> None:
    weight = torch.randn(1000, 1000, generator=torch.Generator().manual_seed(0))
    tail = 0.5 * math.erfc(1 / math.sqrt(2))
    assert share_beyond([weight]) == pytest.approx(tail, abs=4 * math.sqrt(tail / 1e6))
    both = 2 * tail
    assert share_beyond([weight], two_sided=True) == pytest.approx(both, abs=4 * math.sqrt(both / 1e6))


def test_zd_is_over_all_matrices_of_the_block(stack: DecoderStack) -> None:
    matrices = [module.weight.double() for module in stack.block(2).matrices().values()]  # type: ignore[operator]
    flat = torch.cat([matrix.flatten() for matrix in matrices])
    pooled = float(((flat - flat.mean()) / flat.std(correction=0) > 1).double().mean())
    shares = [float(((m - m.mean()) / m.std(correction=0) > 1).double().mean()) for m in matrices]
    assert measure(stack, None, "zd", progress=False)["zd"].values[2] == pytest.approx(pooled, abs=1e-12)
    found = measure(stack, None, ZScoreDistribution(pool="matrices"), progress=False)
    assert found["zd"].values[2] == pytest.approx(sum(shares) / len(shares), abs=1e-12)
