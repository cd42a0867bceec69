"""Least squares across gaps: what it gives back, what it leaves alone, and that nothing shared is written to."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from layerwise.nets.decoder import Block
from layerwise.nets.dense import Dense
from layerwise.spec import Attention, FeedForward, LayerSpec
from layerwise.stack.decoder import DecoderStack
from layerwise.testing.stacks import random_stack
from layerwise.train.bridge import RIDGES, Sums, bridged, fitted
from layerwise.train.duration import Duration
from layerwise.train.heal import BRIDGED, defaults, distil
from layerwise.train.methods import Layers
from layerwise.transform.quantize import Quantize

TOKENS_NT = torch.randint(97, (40, 40), generator=torch.Generator().manual_seed(1))
HELD_NT = torch.randint(97, (4, 40), generator=torch.Generator().manual_seed(2))


def without(stack: DecoderStack, gone: list[int]) -> tuple[DecoderStack, list[int]]:
    kept = [layer for layer in range(len(stack)) if layer not in gone]
    rows = tuple(stack.spec.rows[layer] for layer in kept)
    return stack.rebuilt(replace(stack.spec, rows=rows), [stack.block(layer) for layer in kept]), kept


@torch.inference_mode()
def distance(stack: DecoderStack, original: DecoderStack) -> float:
    """Of the last hidden states on text that nothing was fitted to, by the size of the original's."""
    ours, theirs = (model.run(model.start(HELD_NT)).hidden for model in (stack, original))
    return float(((ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)).mean())


@pytest.mark.parametrize("gone", [[2], [0], [5], [1, 2], [1, 4]])
def test_states_come_nearer_to_the_originals(gone: list[int]) -> None:
    original = random_stack(6)
    for layer in range(6):
        for name in ("o", "down"):  # small additions, as in trained models: what is gone is nearly linear
            original.block(layer).matrix(name).weight.data.mul_(0.3)  # type: ignore[operator]
    student, kept = without(original, gone)
    before = {name: tensor.clone() for name, tensor in original.tensors()}
    found, changed = bridged(student, original, TOKENS_NT, kept)
    assert changed and min(changed) >= max(0, min(gone) - 1)
    assert distance(found, original) < distance(student, original)
    assert all(torch.equal(before[name], tensor) for name, tensor in original.tensors())


def half_written() -> tuple[DecoderStack, DecoderStack]:
    """A student and its original, whose second layer, which is gone, added nothing; but the first writes only half."""
    original = random_stack(2)
    first, second = original.block(0), original.block(1)
    assert isinstance(first, Block) and isinstance(second, Block)
    second.attention = second.feed_forward = None
    student, _ = without(original, [1])
    down = first.matrix("down")
    assert isinstance(down, Dense)
    return student.rebuilt(student.spec, [first.with_matrices({"down": Dense.of(down.weight / 2)})]), original


def test_what_the_half_before_can_write_comes_back_whole() -> None:
    student, original = half_written()
    found, changed = bridged(student, original, TOKENS_NT, [0])
    assert changed == [0] and distance(student, original) > 0.05
    assert distance(found, original) < 0.2 * distance(student, original)


def test_without_a_gap_nothing_is_done() -> None:
    original = random_stack(3)
    assert bridged(original, original, TOKENS_NT, [0, 1, 2]) == (original, [])


PLAIN = LayerSpec(Attention(heads=4, kv_heads=2, head_dim=16), FeedForward(width=128))


@pytest.mark.parametrize("row", [replace(PLAIN, post_norm=True), replace(PLAIN, feed_forward=None),
                                 replace(PLAIN, feed_forward=FeedForward(32, experts=4, experts_per_token=2))],
                         ids=["post norm", "no feed-forward half", "experts"])
def test_halves_without_a_plain_last_matrix_stay(row: LayerSpec) -> None:
    original = random_stack(4, row=row)
    student, kept = without(original, [1])
    found, changed = bridged(student, original, TOKENS_NT, kept)
    assert changed == [] and distance(found, original) == distance(student, original)


def test_packed_matrices_stay() -> None:
    original, change = random_stack(4), Quantize(4, group=32)
    rows = tuple(change.edit(row, original.spec.hidden) for row in original.spec.rows)
    blocks = [change.apply(original.block(layer), row) for layer, row in enumerate(original.spec.rows)]
    packed = original.rebuilt(replace(original.spec, rows=rows), blocks)
    student, kept = without(packed, [1])
    assert bridged(student, packed, TOKENS_NT, kept)[1] == []


def test_a_line_is_found_and_noise_is_not_trusted() -> None:
    draw = torch.Generator().manual_seed(0)
    line, one, other = torch.randn(3, 20, generator=draw), Sums(), Sums()
    for sums in (one, other):
        a_NI = torch.randn(400, 20, generator=draw)
        sums.add(a_NI, a_NI @ line.T)
    change = fitted(one, other)
    assert change is not None
    torch.testing.assert_close(change, line, rtol=0, atol=0.1)
    against = Sums()
    against.add(torch.randn(400, 20, generator=draw), torch.zeros(400, 3))
    assert fitted(one, against) is None


def test_the_ridge_pulls_towards_no_change() -> None:
    sums = Sums()
    sums.add(torch.eye(4), torch.ones(4, 2))
    sizes = [float(sums.solved(ridge).norm()) for ridge in RIDGES]  # type: ignore[union-attr]
    assert sizes == sorted(sizes)
    half = sums.solved(1.0)
    assert half is not None and float(half[0, 0]) == pytest.approx(0.5)


def test_healing_begins_with_it_and_says_so() -> None:
    student, original = half_written()
    recipe = defaults(student, Layers(), Duration(steps=2))
    healed = distil(student, original, TOKENS_NT, HELD_NT, [0], Layers(), recipe)
    assert healed.healing.solved == 1 and "least squares in 1 layer, then 2 steps" in str(healed.healing)
    plain = distil(student, original, TOKENS_NT, HELD_NT, [0], Layers(), recipe, bridge=False)
    assert plain.healing.solved == 0 and healed.healing.after < 0.5 * plain.healing.after


def test_steps_that_lead_away_from_it_are_not_taken() -> None:
    student, original = half_written()
    recipe = replace(defaults(student, Layers(), Duration(steps=3)), learning_rate=3.0, warmup=0)
    healed = distil(student, original, TOKENS_NT, HELD_NT, [0], Layers(), recipe)
    bridge, _ = bridged(student, original, TOKENS_NT[:BRIDGED], [0])
    assert healed.healing.helped
    for (name, tensor), (_, solved) in zip(healed.stack.tensors(), bridge.tensors(), strict=True):
        torch.testing.assert_close(tensor, solved, msg=name)


def test_with_no_time_for_it_there_is_none() -> None:
    student, original = half_written()
    recipe = defaults(student, Layers(), Duration(seconds=1e-6))
    assert distil(student, original, TOKENS_NT, HELD_NT, [0], Layers(), recipe).healing.solved == 0
