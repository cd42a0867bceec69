"""Scaled inputs: the same function in float64, exact folding in bfloat16, and less error after rounding."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from layerwise.errors import BadData, BadOption
from layerwise.nets.decoder import Block
from layerwise.spec import Attention, FeedForward, LayerSpec, Norm, Opaque
from layerwise.stack.decoder import DecoderStack
from layerwise.testing.stacks import random_stack
from layerwise.testing.transforms import check_transform
from layerwise.transform.gram import grams
from layerwise.transform.quantize import Quantize, values
from layerwise.transform.scale_inputs import ScaleInputs

PLAIN = LayerSpec(Attention(4, 2, 16), FeedForward(96))
ROWS = {
    "grouped": PLAIN,
    "biased": LayerSpec(Attention(4, 2, 16, qkv_bias=True, out_bias=True), FeedForward(96, bias=True)),
    "offset": LayerSpec(Attention(4, 1, 16, qk_norm=True), FeedForward(96), Norm(offset=1.0), post_norm=True),
    "ungated": LayerSpec(Attention(4, 4, 16), FeedForward(96, gated=False, activation="gelu"), Norm("layer")),
    "experts": LayerSpec(Attention(4, 2, 16), FeedForward(32, experts=4, experts_per_token=2)),
    "no attention": replace(PLAIN, mixer=None),
}


def prepared(row: LayerSpec, dtype: str = "float64", seed: int = 0) -> tuple[DecoderStack, Block, dict[str, Tensor]]:
    """A stack whose norms have channels of very different gains, its block and Gram matrices."""
    stack = random_stack(1, row=row, dtype="float32" if dtype == "float64" else dtype, seed=seed)
    if dtype == "float64":
        stack.decoder.double()
    block = stack.block(0)
    assert isinstance(block, Block)
    generator = torch.Generator().manual_seed(seed)
    for branch in (block.attention, block.feed_forward):
        if branch is not None:
            branch.norm.weight.data *= torch.logspace(-1, 1, 64)[torch.randperm(64, generator=generator)]
    return stack, block, grams(block, 0, [state_of(stack, seed)])


def state_of(stack: DecoderStack, seed: int = 0):  # type: ignore[no-untyped-def]
    return stack.start(torch.randint(97, (4, 40), generator=torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_contract(row: LayerSpec) -> None:
    check_transform(ScaleInputs(4), random_stack(1, row=row))


@settings(deadline=None, max_examples=12)
@given(name=st.sampled_from(sorted(ROWS)), seed=st.integers(0, 99), bits=st.sampled_from([2, 3, 4]),
       group=st.sampled_from([0, 16]))
def test_the_block_computes_the_same(name: str, seed: int, bits: int, group: int) -> None:
    stack, block, stats = prepared(ROWS[name], seed=seed)
    new = ScaleInputs(bits, group=group, method="nearest").apply(block, ROWS[name], stats)
    state = state_of(stack, seed)
    exact = block(state.hidden, state.shared, 0)
    most = 1e-5 if name == "offset" else 1e-12  # norms with an offset compute in float32
    assert (new(state.hidden, state.shared, 0) - exact).abs().max() <= most * exact.abs().max()


def test_scaling_happens_and_folding_is_exact_in_bfloat16() -> None:
    _, block, stats = prepared(PLAIN, "bfloat16")
    new = ScaleInputs(3).apply(block, PLAIN, stats)
    for name in ("q", "gate"):
        ratio = values(new.matrix(name)).float() / values(block.matrix(name)).float()
        assert ratio.unique().numel() > 1 and torch.equal(ratio, ratio.log2().round().exp2())
        norms = [b.branch(name).norm.weight.float() for b in (block, new)]
        assert torch.equal(norms[0], norms[1] * ratio[0])


def test_query_heads_that_share_a_value_head_share_scales() -> None:
    _, block, stats = prepared(PLAIN)
    new = ScaleInputs(3, inputs=("o",)).apply(block, PLAIN, stats)
    ratio = (values(new.matrix("o")) / values(block.matrix("o")))[0].view(2, 2, 16)
    assert torch.equal(ratio[:, 0], ratio[:, 1])
    rows = (values(block.matrix("v")) / values(new.matrix("v")))[:, 0].view(2, 16)
    torch.testing.assert_close(rows, ratio[:, 0])


def loss(block: Block, prepared_: Block, names: tuple[str, ...], gram: Tensor, rounding: Quantize,
         row: LayerSpec) -> float:
    """Output error of rounding `prepared_`, in the coordinates of `block`, over the matrices that read one input."""
    rounded, total = rounding.apply(prepared_, row), 0.0
    for name in names:
        scale = (values(prepared_.matrix(name)) / values(block.matrix(name))).nanmedian(0).values
        error = values(rounded.matrix(name)) / scale - values(block.matrix(name))
        total += float(((error @ gram) * error).sum())
    return total


@settings(deadline=None, max_examples=12)
@given(name=st.sampled_from(["grouped", "biased", "offset"]), seed=st.integers(0, 99),
       bits=st.sampled_from([2, 3, 4]), group=st.sampled_from([0, 32]))
def test_rounding_afterwards_never_loses_more(name: str, seed: int, bits: int, group: int) -> None:
    row = ROWS[name]
    _, block, stats = prepared(row, "float32", seed)
    rounding = Quantize(bits, group=group)
    new = ScaleInputs(bits, group=group, method="nearest", inputs=("qkv", "gate_up")).apply(block, row, stats)
    for names in (("q", "k", "v"), ("gate", "up")):
        plain, scaled = (loss(block, b, names, stats[names[0]], rounding, row) for b in (block, new))
        assert scaled <= plain * (1 + 1e-5), "no scale is one of the scales tried"


def test_one_large_input_is_worth_a_scale() -> None:
    _, block, stats = prepared(PLAIN, "float32")
    gram = torch.eye(64) + 1000 * torch.diag(torch.eye(64)[5])
    new = ScaleInputs(3, group=0, method="nearest", inputs=("qkv",)).apply(block, PLAIN, dict.fromkeys(stats, gram))
    plain, scaled = (loss(block, b, ("q", "k", "v"), gram, Quantize(3, group=0), PLAIN) for b in (block, new))
    assert scaled < 0.5 * plain


def test_what_cannot_take_the_inverse_is_passed_over() -> None:
    _, block, stats = prepared(ROWS["ungated"])
    new = ScaleInputs(3).apply(block, ROWS["ungated"], stats)
    assert new.matrix("down") is block.matrix("down")
    _, block, stats = prepared(PLAIN)
    only = ScaleInputs(3, inputs=("down",)).apply(block, PLAIN, stats)
    assert only.attention is block.attention and only.matrix("gate") is block.matrix("gate")


def test_inputs_that_were_never_active_are_not_scaled() -> None:
    _, block, stats = prepared(PLAIN)
    dead = {name: torch.zeros_like(gram) for name, gram in stats.items()}
    new = ScaleInputs(3).apply(block, PLAIN, dead)
    for name in block.matrices():
        assert torch.equal(values(new.matrix(name)), values(block.matrix(name)))


def test_refusals() -> None:
    _, block, stats = prepared(PLAIN)
    with pytest.raises(BadOption, match="inputs \\['w'\\]"):
        ScaleInputs(4, inputs=("w",))  # type: ignore[arg-type]
    with pytest.raises(BadOption, match="method='awq'"):
        ScaleInputs(4, method="awq")  # type: ignore[arg-type]
    with pytest.raises(BadOption, match="conv1"):
        ScaleInputs().edit(LayerSpec(Opaque("conv1", "Conv2d", 1, 4), None), 64)
    with pytest.raises(BadOption, match="\\['v'\\] are packed"):
        ScaleInputs().edit(Quantize(4, matrices=("v",)).edit(PLAIN, 64), 64)
    assert ScaleInputs(inputs=("gate_up",)).edit(Quantize(4, matrices=("v",)).edit(PLAIN, 64), 64)
    with pytest.raises(BadData, match="matrix 'o' without"):
        ScaleInputs().apply(block, PLAIN)
    with pytest.raises(BadData, match="Gram matrix of shape"):
        ScaleInputs().apply(block, PLAIN, stats | {"o": torch.full((64, 64), float("nan"))})
