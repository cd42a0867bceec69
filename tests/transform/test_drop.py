"""Dropping layers and halves of layers."""

from __future__ import annotations

import pytest
import torch

from layerwise.errors import BadOption
from layerwise.nets.decoder import Block
from layerwise.spec import Format, LayerSpec, Opaque
from layerwise.stack.decoder import DecoderStack
from layerwise.testing.stacks import random_stack
from layerwise.testing.transforms import check_transform
from layerwise.transform.drop import Drop
from layerwise.transform.quantize import Quantize


@pytest.fixture(scope="module")
def stack() -> DecoderStack:
    return random_stack(2)


@pytest.mark.parametrize("part", ["layer", "attention", "feed_forward"])
def test_contract(stack: DecoderStack, part: str) -> None:
    check_transform(Drop(part), stack)  # type: ignore[arg-type]


def test_what_is_left_is_the_other_half(stack: DecoderStack) -> None:
    block = stack.block(0)
    assert isinstance(block, Block) and block.attention is not None and block.feed_forward is not None
    state = stack.start(torch.arange(10).view(2, 5))
    x = state.hidden
    no_attention, no_feed_forward = (Drop(part).apply(block, stack.spec.rows[0])
                                     for part in ("attention", "feed_forward"))
    assert no_attention is not None and no_feed_forward is not None
    assert torch.equal(no_attention(x, state.shared, 0), x + block.feed_forward(x))
    assert torch.equal(no_feed_forward(x, state.shared, 0), x + block.attention(x, state.shared, 0))


def test_both_halves_are_the_whole(stack: DecoderStack) -> None:
    row, block = stack.spec.rows[0], stack.block(0)
    half = Drop("attention").edit(row, 64)
    assert half is not None and Drop("feed_forward").edit(half, 64) is None
    left = Drop("attention").apply(block, row)
    assert left is not None and Drop("feed_forward").apply(left, half) is None


def test_formats_go_with_their_matrices(stack: DecoderStack) -> None:
    row = Quantize(4).edit(stack.spec.rows[0], 64)
    half = Drop("attention").edit(row, 64)
    assert half is not None and dict(half.formats) == dict.fromkeys(("gate", "up", "down"), Format(4, 32))


def test_refusals() -> None:
    opaque = LayerSpec(Opaque("conv1", "Conv2d", 1, 4), None)
    assert Drop().edit(opaque, 0) is None
    with pytest.raises(BadOption, match="attention of conv1"):
        Drop("attention").edit(opaque, 0)
    with pytest.raises(BadOption, match="part='mlp'"):
        Drop("mlp")  # type: ignore[arg-type]
