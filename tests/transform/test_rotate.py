"""Rotations: orthogonal, the same function in float64, flatter weights where one channel stands out, refusals."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from layerwise.errors import BadOption
from layerwise.nets.decoder import Block, Decoder
from layerwise.spec import Attention, FeedForward, LayerSpec, Norm, Opaque, StackSpec
from layerwise.stack.decoder import DecoderStack
from layerwise.testing.stacks import random_stack
from layerwise.testing.transforms import check_transform
from layerwise.transform.quantize import Quantize, values
from layerwise.transform.rotate import RotateValues, rotate_residual, rotation

PLAIN = LayerSpec(Attention(4, 2, 16), FeedForward(96))
BIASED = LayerSpec(Attention(4, 2, 12, qkv_bias=True, out_bias=True, qk_norm=True), FeedForward(96, bias=True))
EXPERTS = LayerSpec(Attention(4, 4, 16), FeedForward(32, experts=4, experts_per_token=2))
ROWS = {"grouped": PLAIN, "biased": BIASED, "experts": EXPERTS}


def untied(row: LayerSpec, hidden: int = 48, offset: float = 0.0, positions: int = 0) -> DecoderStack:
    """Two layers in float64 with a head of their own, and gains far from 1."""
    row = replace(row, norm=Norm(offset=offset))
    spec = StackSpec("llama", hidden, 61, (row, row), tied=False, dtype="float32", context=64,
                     learned_positions=positions, final_norm=Norm(offset=offset))
    decoder, generator = Decoder(spec).double(), torch.Generator().manual_seed(1)
    for parameter in decoder.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data = noise * parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 1 + 0.5 * noise
    return DecoderStack(decoder.requires_grad_(False).eval(), name="random")


def logits(stack: DecoderStack, tokens: Tensor) -> Tensor:
    return stack.finish(stack.run(stack.start(tokens)))


@settings(deadline=None, max_examples=20)
@given(width=st.integers(1, 96), seed=st.integers(0, 99))
def test_rotations_are_orthogonal_and_seeded(width: int, seed: int) -> None:
    turn = rotation(width, torch.Generator().manual_seed(seed))
    torch.testing.assert_close(turn @ turn.T, torch.eye(width, dtype=torch.float64))
    assert torch.equal(turn, rotation(width, torch.Generator().manual_seed(seed)))


def test_a_power_of_two_spreads_a_channel_evenly() -> None:
    turn = rotation(64, torch.Generator().manual_seed(0))
    torch.testing.assert_close(turn.abs(), torch.full((64, 64), 0.125, dtype=torch.float64))


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_contract(row: LayerSpec) -> None:
    check_transform(RotateValues(seed=3), random_stack(1, row=row))


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_rotated_values_change_nothing_that_the_block_computes(row: LayerSpec) -> None:
    stack = untied(row)
    block, state = stack.block(0), stack.start(torch.arange(12).view(2, 6))
    assert isinstance(block, Block)
    new = RotateValues().apply(block, row)
    assert not torch.allclose(values(new.matrix("v")), values(block.matrix("v")))
    torch.testing.assert_close(new(state.hidden, state.shared, 0), block(state.hidden, state.shared, 0),
                               rtol=1e-11, atol=1e-11)
    assert new.feed_forward is block.feed_forward


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_a_rotated_residual_stream_gives_the_same_logits(row: LayerSpec, offset: float) -> None:
    stack = untied(row, offset=offset, positions=16)
    new, tokens = rotate_residual(stack, seed=2), torch.arange(12).view(2, 6)
    before = {name: tensor.clone() for name, tensor in stack.tensors()}
    most = 1e-5 if offset else 1e-10  # norms with an offset compute in float32
    torch.testing.assert_close(logits(new, tokens), logits(stack, tokens), rtol=most, atol=most)
    assert all(torch.equal(before[name], tensor) for name, tensor in stack.tensors())
    assert not torch.allclose(new.decoder.embedding.weight, stack.decoder.embedding.weight)  # type: ignore[arg-type]


def test_outliers_are_spread_so_that_rounding_loses_less() -> None:
    stack = untied(PLAIN, hidden=64)
    block, state = stack.block(0), stack.start(torch.arange(40).view(2, 20))
    assert isinstance(block, Block)
    block.matrix("o").weight.data[:, ::16] *= 30  # type: ignore[operator]
    exact = block(state.hidden, state.shared, 0)
    rounding = Quantize(4, group=0, matrices=("o",))
    plain, turned = (((rounding.apply(b, PLAIN)(state.hidden, state.shared, 0) - exact) ** 2).mean()
                     for b in (block, RotateValues().apply(block, PLAIN)))
    assert turned < 0.5 * plain


def test_refusals() -> None:
    with pytest.raises(BadOption, match="head is its embedding"):
        rotate_residual(random_stack(1))
    with pytest.raises(BadOption, match="subtract the mean"):
        rotate_residual(untied(replace(PLAIN, post_norm=True)))
    stack = untied(PLAIN)
    packed = stack.rebuilt(stack.spec.with_rows({0: Quantize(4).edit(PLAIN, 48)}), stack.decoder.layers)
    with pytest.raises(BadOption, match="packed or factored"):
        rotate_residual(packed)
    with pytest.raises(BadOption, match="makes none"):
        RotateValues().edit(LayerSpec(Opaque("conv1", "Conv2d", 1, 4), None), 64)
    with pytest.raises(BadOption, match="\\['o'\\], which are packed"):
        RotateValues().edit(Quantize(4, matrices=("o", "up")).edit(PLAIN, 64), 64)
