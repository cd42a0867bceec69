"""Bytes of a row by hand, shares that follow from the times, and modules."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from layerwise.errors import BadOption
from layerwise.measure.cost import flops
from layerwise.measure.engine import measure
from layerwise.measure.roofline import Roofline, decoding, moved
from layerwise.spec import Attention, FeedForward, Format, LayerSpec, StateSpace
from layerwise.stack.decoder import DecoderStack
from layerwise.stack.module import ModuleStack

ROW = LayerSpec(Attention(4, 2, 16), FeedForward(128))
LIMITS = {"peak": 1e9, "bandwidth": 1e9}


def test_bytes_of_one_token_by_hand() -> None:
    matrices = [(64, 64), (64, 32), (64, 32), (64, 64), (64, 128), (64, 128), (128, 64)]
    through = sum(a + b for a, b in matrices)
    cache, queries = 2 * 2 * 16 * 11, 2 * 4 * 16
    assert moved(ROW, 64, "float32", 1, 10) == ROW.bytes(64, "float32") + 4 * (through + cache + queries)


def test_packed_weights_move_fewer_bytes() -> None:
    packed = LayerSpec(ROW.mixer, ROW.feed_forward, formats={"up": Format(4, 32)})
    assert moved(packed, 64, "float32", 1) < moved(ROW, 64, "float32", 1)


def test_operations_of_one_token_grow_with_the_past() -> None:
    assert decoding(ROW, 64, 0) == flops(ROW, 64, 1)
    assert decoding(ROW, 64, 10) - decoding(ROW, 64, 0) == 4 * 4 * 16 * 10


def test_a_state_takes_the_same_however_long_the_past_is() -> None:
    row = LayerSpec(StateSpace(heads=4, head_dim=8, state=16, conv=4), None)
    inputs = (32 + 64 + 4, 64), (64, 32)  # gate, channels and steps; output
    assert flops(row, 64, 1) == 2 * sum(a * b for a, b in inputs) + 2 * 4 * 64 + 5 * 4 * 8 * 16
    assert decoding(row, 64, 0) == decoding(row, 64, 1000) == flops(row, 64, 1)
    state = 4 * (3 * 64 + 4 * 8 * 16)
    assert moved(row, 64, "float32", 1, 99) == row.bytes(64, "float32") + 4 * sum(map(sum, inputs)) + 2 * state


def test_a_window_ends_that() -> None:
    narrow = LayerSpec(Attention(4, 2, 16, window=4), ROW.feed_forward)
    assert decoding(narrow, 64, 100) == decoding(narrow, 64, 3)
    assert moved(narrow, 64, "float32", 1, 100) == moved(narrow, 64, "float32", 1, 3)


def test_columns_of_a_decoder(stack: DecoderStack) -> None:
    found = measure(stack, None, Roofline(prompt=32, repeats=1, **LIMITS), progress=False)
    expected = 32 * flops(stack.spec.rows[0], 64, 32) / moved(stack.spec.rows[0], 64, "float32", 32)
    assert found["roofline:intensity"].values == pytest.approx([expected] * 4)
    for part in ("utilization", "attained", "decode-attained"):
        assert all(value > 0 for value in found[f"roofline:{part}"].values)
    pairs = zip(found["roofline:utilization"].values, found["roofline:attained"].values, strict=True)
    assert all(attained == pytest.approx(used * max(1.0, 1 / expected)) for used, attained in pairs)


def test_columns_of_a_module() -> None:
    module = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)))
    found = measure(ModuleStack(module), [torch.randn(5, 8)], Roofline(repeats=1, **LIMITS), progress=False)
    expected = 2 * 5 * 64 / (4 * (40 + 64 + 8 + 40))
    assert found["roofline:intensity"].values == pytest.approx([expected] * 3)
    assert "roofline:decode-attained" not in found  # a module decodes nothing


def test_limits_are_given_together(stack: DecoderStack, tokens_NT: Tensor) -> None:
    with pytest.raises(BadOption, match="have them measured"):
        measure(stack, tokens_NT, Roofline(peak=1e9), progress=False)
