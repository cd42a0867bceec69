"""Layers move down in the orders they should, bytes are compared fairly, and the system runs from end to end."""

from __future__ import annotations

import pytest
import torch

import layerwise as lw
from layerwise.data import TextData, text_blocks
from layerwise.stack.decoder import DecoderStack
from layerwise.systems.base import Check
from layerwise.systems.transform import layerwise_quant
from layerwise.systems.transform.layerwise_quant import quantized
from layerwise.testing import check_system
from layerwise.testing.stacks import random_stack

TOKENS_BT = torch.arange(20)[None]


@pytest.fixture
def stack() -> DecoderStack:
    return random_stack(4, hidden=64)


@pytest.fixture
def text(small: DecoderStack) -> TextData:
    assert small.tokenizer is not None
    return text_blocks("default", small.tokenizer, length=32, blocks=2)


def bits(stack: lw.Stack) -> list[set[int]]:
    return [{packed.bits for packed in row.formats.values()} for row in stack.spec.rows]


def test_every_layer_gets_its_width_and_the_rest_is_shared(stack: DecoderStack) -> None:
    slim = quantized(stack, {0: 8, 1: 4, 3: 2})
    assert bits(slim) == [{8}, {4}, set(), {2}]
    assert {packed.group for row in slim.spec.rows for packed in row.formats.values()} == {64}
    assert slim.decoder.embedding is stack.decoder.embedding
    assert slim.spec.bytes() == sum(t.numel() * t.element_size() for _, t in slim.tensors())


def test_layers_can_go_instead(stack: DecoderStack) -> None:
    slim = quantized(stack, dict.fromkeys(range(4), 8), gone=[1, 2])
    with stack.skip(1), stack.skip(2):
        skipped = stack(TOKENS_BT)
    assert len(slim) == 2
    torch.testing.assert_close(slim(TOKENS_BT), skipped, rtol=0.1, atol=0.2)


def test_a_curve_mixes_both_widths_layer_by_layer(small: DecoderStack, text: TextData) -> None:
    order = list(range(30))[::-1]
    curve = layerwise_quant._curves(small, (8, 2), {"last first": order}, (0, 7, 30), text)["last first"]
    for moved, loss in zip(curve.points, curve.losses, strict=True):
        whole = quantized(small, {layer: 2 if layer in order[:moved] else 8 for layer in range(30)})
        assert loss == layerwise_quant._losses(whole, text).mean


def test_orders_are_permutations_and_the_reverse_is_one(small: DecoderStack, text: TextData) -> None:
    scores = lw.measure(small, text, ["lim", "zd"], progress=False)
    orders = layerwise_quant._orders(scores, 4, randoms=2, seed=0)
    assert set(orders) == {"lim", "zd", "reversed lim", "depth", "random 0", "random 1"}
    assert all(sorted(order) == list(range(30)) for order in orders.values())
    lim = scores["lim"].values
    assert [lim[layer] for layer in orders["lim"]] == sorted(lim)
    assert orders["reversed lim"] == orders["lim"][::-1] and orders["depth"] == list(range(30))
    assert orders["random 0"] != orders["random 1"]


def test_dropping_never_gets_fewer_bytes_than_fewer_bits(small: DecoderStack, text: TextData) -> None:
    for pair in ((8, 4), (4, 2)):
        check = layerwise_quant._drop(small, list(range(30)), pair, text)
        row = quantized(small, {0: pair[0]}).spec.rows[0].bytes(32, "bfloat16")
        assert 0 <= check.control["dropped"]["bytes"] - check.measured["bytes"] < row


def test_it_runs(small: DecoderStack) -> None:
    area, near, drop = check_system("layerwise-quant")
    _no_verdict_from_few_points(area, near)
    assert drop.name == "4 bits against dropping at equal bytes"


def _no_verdict_from_few_points(*checks: Check) -> None:
    for check in checks:
        assert check.holds is None and set(check.measured["8/4"]) == {"lim", "zd"}
        assert set(check.control["8/4"]) == {"reversed lim", "depth", "random mean", "random deviation"}


@pytest.mark.slow
def test_full_adds_the_oracle_more_pairs_and_gptq(small: DecoderStack) -> None:
    area, near, *drops, gptq = check_system("layerwise-quant", "full")
    for check in (area, near):
        assert set(check.measured) == {"8/4", "4/3", "4/2"} and check.holds is not None
        assert all(set(found) == {"lim", "zd", "oracle"} for found in check.measured.values())
    assert [check.name[:6] for check in drops] == ["4 bits", "2 bits"] and "GPTQ" in gptq.name


@pytest.mark.real
@pytest.mark.slow
def test_it_runs_on_the_real_model() -> None:
    check_system("layerwise-quant")
