"""Output errors before anything is built: after learned rotations too, and only where values may be rotated."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import cast

import pytest
import torch

from layerwise.allocate.choices import keep, make_choices, narrowed
from layerwise.measure.engine import measure
from layerwise.measure.output_error import OutputError, kept_units
from layerwise.measure.response import Response
from layerwise.nets.decoder import Block
from layerwise.nets.dense import Dense
from layerwise.spec import Attention, FeedForward, Format, LayerSpec
from layerwise.stack.decoder import DecoderStack
from layerwise.testing.stacks import random_stack
from layerwise.transform.gram import grams
from layerwise.transform.learn_rotation import LearnRotation
from layerwise.transform.low_rank import LowRank
from layerwise.transform.narrow import Narrow
from layerwise.transform.output_error import energy, unseen
from layerwise.transform.quantize import Quantize, values

ROW = LayerSpec(Attention(4, 2, 16), FeedForward(96))
TOKENS = torch.randint(50, (4, 48), generator=torch.Generator().manual_seed(0))


def test_errors_after_the_learned_rotation_are_those_of_the_rotated_block() -> None:
    """Plain rounding of all 64 outputs, measured on the rotated block itself."""
    stack = random_stack(1, row=ROW)
    scores = measure(stack, TOKENS, [OutputError(("3/16", "2/64"), "nearest", rotated=True)], progress=False)
    block, states = cast(Block, stack.block(0)), [stack.start(TOKENS)]
    turned = LearnRotation().apply(block, ROW, grams(block, 0, states))
    inputs = grams(turned, 0, states)
    for name in ("v", "o"):
        weight_OI = values(turned.matrix(name)).float()
        for label in ("3/16", "2/64"):
            format = Format.parse(label)
            packed = Quantize(format.bits, format.group, method="nearest").apply(turned, ROW)
            lost = energy(weight_OI - values(packed.matrix(name)), inputs[name]) / energy(weight_OI, inputs[name])
            assert scores[f"output-error:{name}:rotated {label}"].values[0] == pytest.approx(lost, rel=1e-3)


def test_only_values_that_no_other_layer_reads_are_rotated() -> None:
    sharing = replace(ROW, mixer=Attention(4, 2, 16, shares=0))
    stack = random_stack(rows=(ROW, sharing, ROW))
    scores = measure(stack, TOKENS, [OutputError(("3/16",), "nearest", rotated=True)], progress=False)
    known = [value == value for value in scores["output-error:o:rotated 3/16"].values]
    assert known == [False, False, True]


def post_normed(gain_C: torch.Tensor) -> DecoderStack:
    """One layer with a norm behind each half, whose weights are given."""
    stack = random_stack(1, row=replace(ROW, post_norm=True))
    for branch in (cast(Block, stack.block(0)).attention, cast(Block, stack.block(0)).feed_forward):
        assert branch is not None
        branch.post_norm.weight.data.copy_(gain_C)  # type: ignore[union-attr]
    return stack


def lost(stack: DecoderStack, changed: Block, half: str) -> float:
    """The relative squared error of what a half of the block writes to the stream, but for the common scale."""
    written = []
    for block in (cast(Block, stack.block(0)), changed):
        branch = getattr(block, half)
        branch.post_norm, norm = torch.nn.Identity(), branch.post_norm
        with torch.inference_mode():
            state = stack.start(TOKENS)
            x = state.hidden if half == "attention" else state.hidden + block.attention(state.hidden, state.shared, 0)
            written.append(branch(x, *((state.shared, 0) if half == "attention" else ())) * norm.weight)
        branch.post_norm = norm
    return float((written[1] - written[0]).square().sum() / written[0].square().sum())


@pytest.mark.parametrize("name", ["o", "down"])
def test_errors_count_as_the_norm_behind_them_scales_them(name: str) -> None:
    """One channel of a hundred times the others' gain bears what the stream gets; so does that of a width."""
    gain_C = torch.ones(64)
    gain_C[5] = 100.0
    stack, half = post_normed(gain_C), {"o": "attention", "down": "feed_forward"}[name]
    row, block = stack.spec.rows[0], cast(Block, stack.block(0))
    found = measure(stack, TOKENS, [OutputError(("3/16",), "nearest", widths=(0.25,), ranks=(0.5,))], progress=False)
    packed = Quantize(3, 16, method="nearest", matrices=(name,)).apply(block, row)
    dense = block.with_matrices({name: Dense.of(values(packed.matrix(name)))})
    assert found[f"output-error:{name}:3/16"].values[0] == pytest.approx(lost(stack, dense, half), rel=0.1)
    gram_of = grams(block, 0, [stack.start(TOKENS)])
    factored = LowRank(0.5, matrices=(name,)).apply(block, row, gram_of)
    assert found[f"output-error:{name}:rank 0.5"].values[0] == pytest.approx(lost(stack, factored, half), rel=0.02)
    if name == "down":
        narrow = Narrow(width=kept_units(0.25, 96, name)).apply(block, row, gram_of)
        expected = lost(stack, narrow, half) * unseen(24, TOKENS.numel())
        assert found["output-error:down:width 0.25"].values[0] == pytest.approx(expected, rel=0.1)


def test_what_predictions_feel_is_what_counts() -> None:
    """An output that no prediction feels bears errors for nothing; the digest of what is felt is in the record."""
    stack = random_stack(1, row=ROW)
    felt_C = torch.zeros(64)
    felt_C[3] = 1.0
    one = OutputError(("2/64",), "nearest", widths=(0.5,), ranks=(0.5,), sensitivity=(felt_C,))
    found = measure(stack, TOKENS, [one], progress=False)
    block = cast(Block, stack.block(0))
    gram_of = grams(block, 0, [stack.start(TOKENS)])
    for name in ("o", "down"):
        row_1I = values(block.matrix(name))[3:4].float()
        left_1I = values(LowRank(0.5, matrices=(name,)).apply(block, ROW, gram_of).matrix(name))[3:4].float() - row_1I
        expected = energy(left_1I, gram_of[name]) / energy(row_1I, gram_of[name])
        assert found[f"output-error:{name}:rank 0.5"].values[0] == pytest.approx(expected, rel=1e-3)
        packed = Quantize(2, 64, method="nearest", matrices=(name,)).apply(block, ROW)
        expected = energy(values(packed.matrix(name))[3:4] - row_1I, gram_of[name]) / energy(row_1I, gram_of[name])
        assert found[f"output-error:{name}:2/64"].values[0] == pytest.approx(expected, rel=1e-3)
    plain = measure(stack, TOKENS, [replace(one, sensitivity=())], progress=False)
    assert found["output-error:q:2/64"] == plain["output-error:q:2/64"]
    assert one.to_json()["sensitivity"] != replace(one, sensitivity=(felt_C + 1,)).to_json()["sensitivity"]
    assert replace(one, sensitivity=()).to_json()["sensitivity"] is None


def test_inputs_that_span_few_directions_are_no_error() -> None:
    """70 of 96 channels are dead, so that fewer directions are seen than the largest rank has."""
    stack = random_stack(1, row=ROW)
    block = cast(Block, stack.block(0))
    for name in ("gate", "up"):
        block.matrix(name).weight.data[:70] = 0.0  # type: ignore[union-attr]
    one = OutputError(("3/16",), "nearest", ranks=(0.9, 0.2), sensitivity=(torch.ones(64),))
    found = measure(stack, TOKENS, [one], progress=False)
    most, few = (found[f"output-error:down:rank {share}"].values[0] for share in one.ranks)
    assert 0 <= most < 1e-9 and few > 0.01


def test_errors_on_unseen_tokens_grow_with_what_was_fitted() -> None:
    """Least squares with 40 unknowns on 160 samples, where noise is all that they see."""
    generator = torch.Generator().manual_seed(0)
    ratios = []
    for _ in range(40):
        x, y, new_x, new_y = (torch.randn(160, count, generator=generator) for count in (40, 1, 40, 1))
        w = torch.linalg.lstsq(x, y).solution
        ratios.append(float((new_y - new_x @ w).square().sum() / (y - x @ w).square().sum()))
    assert sum(ratios) / 40 == pytest.approx(unseen(40, 160), rel=0.1)
    assert math.isnan(unseen(160, 160))


def test_widths_that_so_few_tokens_cannot_show_are_not_offered() -> None:
    """Of 48 tokens, half of 96 channels are too many and a quarter is not."""
    stack = random_stack(2, row=ROW)
    scores = measure(stack, TOKENS[:1], [OutputError(("4/16",), "nearest", widths=(0.5, 0.25)), Response()],
                     progress=False)
    few, some = (scores[f"output-error:down:width {share}"].values for share in (0.5, 0.25))
    assert all(map(math.isnan, few)) and not any(map(math.isnan, some))
    groups, _ = make_choices(scores, [keep(), *narrowed((0.5, 0.25), stack.spec)])
    assert {choice.label for group in groups for choice in group} == {"keep", "width 24", "kv_heads 1"}
