"""Learned rotations: orthogonal, the same function in float64, never worse than their start, better after GPTQ."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from layerwise.errors import BadData, BadModel, BadOption
from layerwise.nets.decoder import Block
from layerwise.spec import Attention, FeedForward, Format, LayerSpec, StateSpace
from layerwise.testing.stacks import random_stack
from layerwise.testing.transforms import check_transform
from layerwise.transform.gptq import gptq, output_error
from layerwise.transform.gram import grams
from layerwise.transform.learn_rotation import ExpectedError, LearnRotation, learned_rotation
from layerwise.transform.quantize import Quantize, values

PLAIN = LayerSpec(Attention(4, 2, 16), FeedForward(96))
BIASED = LayerSpec(Attention(4, 2, 12, qkv_bias=True, out_bias=True, qk_norm=True), FeedForward(96, bias=True))
ROWS = {"grouped": PLAIN, "biased": BIASED}


def problem(mixer: Attention, hidden: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random v, o and Gram matrices of correlated inputs of unequal power."""
    generator = torch.Generator().manual_seed(seed)

    def inputs(width: int) -> Tensor:
        mixed = torch.randn(3 * width, width, generator=generator) @ torch.randn(width, width, generator=generator)
        return mixed * torch.rand(width, generator=generator)

    wide = mixer.heads * mixer.head_dim
    v_OC = torch.randn(mixer.kv_heads * mixer.head_dim, hidden, generator=generator)
    o_OI = torch.randn(hidden, wide, generator=generator)
    return v_OC, o_OI, *(x.T @ x for x in (inputs(hidden), inputs(wide)))  # type: ignore[return-value]


def rotated(o_OI: Tensor, gram_II: Tensor, turn_KDD: Tensor, mixer: Attention) -> tuple[Tensor, Tensor]:
    whole = torch.block_diag(*turn_KDD.float().repeat_interleave(mixer.heads // mixer.kv_heads, 0))
    return o_OI @ whole.T, whole @ gram_II @ whole.T


@settings(deadline=None, max_examples=8)
@given(width=st.sampled_from([2, 6, 16]), heads=st.sampled_from([(1, 1), (4, 2), (3, 3)]), seed=st.integers(0, 99),
       group=st.sampled_from([0, 8, 32, 40]))
def test_orthogonal_repeatable_and_never_worse_than_the_start(width: int, heads: tuple[int, int], seed: int,
                                                              group: int) -> None:
    mixer = Attention(*heads, width)
    given_ = problem(mixer, 24, seed)
    start, learned, again = (learned_rotation(*given_, mixer, group, steps, seed) for steps in (0, 8, 8))
    assert torch.equal(learned, again)
    eye = torch.eye(width, dtype=torch.float64).expand(heads[1], -1, -1)
    torch.testing.assert_close(learned @ learned.mT, eye, rtol=0, atol=1e-12)
    expected = ExpectedError(*given_, mixer, group)
    assert float(expected(learned.float())) <= float(expected(start.float())) * (1 + 1e-5)


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_contract(row: LayerSpec) -> None:
    check_transform(LearnRotation(steps=3), random_stack(1, row=row))


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_the_block_computes_the_same(row: LayerSpec) -> None:
    stack = random_stack(1, row=row)
    stack.decoder.double()
    block, state = stack.block(0), stack.start(torch.arange(12).view(2, 6))
    assert isinstance(block, Block)
    new = LearnRotation(steps=5).apply(block, row, grams(block, 0, [state]))
    assert not torch.allclose(values(new.matrix("v")), values(block.matrix("v")))
    torch.testing.assert_close(new(state.hidden, state.shared, 0), block(state.hidden, state.shared, 0),
                               rtol=1e-5, atol=1e-5)
    assert new.feed_forward is block.feed_forward


def test_the_expected_error_is_that_of_a_known_case() -> None:
    """One head of two channels, independent inputs of power 1 and 4: p = 1.25 power, ranges by hand."""
    mixer = Attention(1, 1, 2)
    v_OC, o_OI = torch.tensor([[0.0, 1.0], [0.0, 3.0]]), torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    gram_CC, gram_II = torch.eye(2), torch.diag(torch.tensor([1.0, 4.0]))
    expected = ExpectedError(v_OC, o_OI, gram_CC, gram_II, mixer, group=0)
    error = float(expected(torch.eye(2)[None]))
    ranges_v, ranges_o, energy_v, energy_o = 1 + 9, 1 + 4, 1 + 9, 1 + 4 * 4
    assert error == pytest.approx(ranges_v * 1.25 * 2 / energy_v + ranges_o * 1.25 * 5 / energy_o, rel=1e-4)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_gptq_then_loses_less_than_after_the_random_rotation(bits: int) -> None:
    mixer, format = Attention(4, 2, 16), Format(bits, 16)
    v_OC, o_OI, gram_CC, gram_II = problem(mixer, 48, seed=5)
    lost = []
    for steps in (0, 40):
        turn_KDD = learned_rotation(v_OC, o_OI, gram_CC, gram_II, mixer, 16, steps)
        turned_OI, turned_II = rotated(o_OI, gram_II, turn_KDD, mixer)
        lost.append(float(output_error(turned_OI, turned_II, gptq(turned_OI, turned_II, format), format).sum()))
    assert lost[1] < 0.9 * lost[0]


def test_constant_inputs_and_inputs_that_were_never_active() -> None:
    mixer = Attention(4, 2, 16)
    v_OC, o_OI, gram_CC, gram_II = problem(mixer, 48, seed=1)
    for gram in (torch.zeros_like(gram_II), torch.ones_like(gram_II), gram_II * (torch.arange(64) % 16 < 9)):
        gram = gram * (gram.T != 0)
        turn_KDD = learned_rotation(v_OC, o_OI, gram_CC, gram, mixer, 16, 5)
        torch.testing.assert_close(turn_KDD @ turn_KDD.mT, torch.eye(16, dtype=torch.float64).expand(2, -1, -1))


def test_refusals() -> None:
    stack = random_stack(1, row=PLAIN)
    block, state = stack.block(0), stack.start(torch.arange(12).view(2, 6))
    assert isinstance(block, Block)
    stats = grams(block, 0, [state])
    with pytest.raises(BadOption, match="numbers from 0"):
        LearnRotation(steps=-1)
    with pytest.raises(BadOption, match="makes none"):
        LearnRotation().edit(LayerSpec(StateSpace(8, 16, 8), FeedForward(128)), 64)
    with pytest.raises(BadOption, match="makes none"):
        LearnRotation().edit(replace(PLAIN, mixer=Attention(4, 2, 16, shares=0)), 64)
    with pytest.raises(BadOption, match="\\['o'\\], which are packed"):
        LearnRotation().edit(Quantize(4, matrices=("o",)).edit(PLAIN, 64), 64)
    with pytest.raises(BadData, match="without statistics"):
        LearnRotation().apply(block, PLAIN, {})
    with pytest.raises(BadData, match="finite numbers"):
        LearnRotation().apply(block, PLAIN, {**stats, "o": stats["o"] * torch.nan})
    block.matrix("v").weight.data[0, 0] = torch.inf  # type: ignore[operator]
    with pytest.raises(BadModel, match="'v'"):
        LearnRotation().apply(block, PLAIN, stats)
