"""Each change does what it says, only where it is told to, and leaves nothing behind."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from layerwise.errors import BadOption
from layerwise.spec import FeedForward, LayerSpec
from layerwise.stack import DecoderStack
from layerwise.stack.changes import added, at, clamped, edits, put, restored, scaled, without
from layerwise.testing.stacks import random_stack

TOKENS_BT = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])


def x() -> Tensor:
    return torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0))


def test_a_change_reaches_only_its_places() -> None:
    places_BT = torch.tensor([[True, False, False, True], [False, False, True, False]])
    changed = at(places_BT, put(torch.zeros(6)))(x())
    assert not bool(changed[places_BT].any())
    assert torch.equal(changed[~places_BT], x()[~places_BT])


def test_one_row_of_places_stands_for_all() -> None:
    changed = at(torch.tensor([False, True, False, False]), added(torch.ones(6)))(x())
    assert torch.equal(changed[:, 1], x()[:, 1] + 1) and torch.equal(changed[:, 2:], x()[:, 2:])


def test_a_removed_direction_is_gone_and_the_rest_stays() -> None:
    directions_KC = torch.randn(2, 6, generator=torch.Generator().manual_seed(1))
    changed = without(directions_KC)(x())
    torch.testing.assert_close(changed @ directions_KC.T, torch.zeros(2, 4, 2), atol=1e-5, rtol=0)
    across = torch.linalg.svd(directions_KC).Vh[2:]
    torch.testing.assert_close(changed @ across.T, x() @ across.T)


@pytest.mark.parametrize("directions", [torch.zeros(6), torch.ones(2, 6)])
def test_directions_must_be_independent(directions: Tensor) -> None:
    with pytest.raises(BadOption, match="independent"):
        without(directions)


@pytest.mark.parametrize("value", [2.5, torch.tensor([1.0, 2.0])])
def test_clamped_units_have_their_value(value: float | Tensor) -> None:
    changed, others = clamped([1, 4], value)(x()), [0, 2, 3, 5]
    assert bool((changed[..., [1, 4]] == value).all())
    assert torch.equal(changed[..., others], x()[..., others])


def test_scaled_units_are_multiplied() -> None:
    changed = scaled([0, 3], torch.tensor([0.0, 2.0]))(x())
    assert not bool(changed[..., 0].any()) and torch.equal(changed[..., 3], 2 * x()[..., 3])


def test_no_units_change_nothing() -> None:
    assert torch.equal(scaled([], 0.0)(x()), x())


def test_units_outside_are_refused() -> None:
    with pytest.raises(BadOption, match="unit 6 of 6"):
        scaled([6], 0.0)(x())


# on a stack -------------------------------------------------------------------------------------


def test_neurons_are_what_enters_the_last_matrix(tiny_stack: DecoderStack) -> None:
    with tiny_stack.capture("neurons", "feed_forward") as seen:
        tiny_stack(TOKENS_BT)
    for layer in range(4):
        down = tiny_stack.decoder.layers[layer].matrix("down")  # type: ignore[union-attr, operator]
        assert torch.equal(down(seen[layer, "neurons"]), seen[layer, "feed_forward"])


def test_switching_all_neurons_off_zeroes_the_half(tiny_stack: DecoderStack) -> None:
    clean = tiny_stack(TOKENS_BT)
    with tiny_stack.zero(1, "feed_forward"):
        zeroed = tiny_stack(TOKENS_BT)
    with edits(tiny_stack, "neurons", {1: scaled(range(64), 0.0)}):
        assert torch.equal(tiny_stack(TOKENS_BT), zeroed)
    assert torch.equal(tiny_stack(TOKENS_BT), clean)


def test_scaling_the_activated_gate_is_scaling_the_neuron(tiny_stack: DecoderStack) -> None:
    body = tiny_stack.decoder.layers[1].feed_forward.body  # type: ignore[union-attr]
    activation = body.act  # type: ignore[union-attr]
    with edits(tiny_stack, "neurons", {1: scaled([3, 9], 2.0)}):
        product = tiny_stack(TOKENS_BT)
    body.act = lambda gate: scaled([3, 9], 2.0)(activation(gate))  # type: ignore[operator, union-attr]
    torch.testing.assert_close(tiny_stack(TOKENS_BT), product)


def test_states_of_a_clean_run_undo_a_corruption(tiny_stack: DecoderStack) -> None:
    clean = tiny_stack(TOKENS_BT)
    with tiny_stack.capture("output", layers=range(2, 3)) as seen:
        tiny_stack(TOKENS_BT)
    with tiny_stack.noise(0, "input", 1.0), restored(tiny_stack, seen):
        assert torch.equal(tiny_stack(TOKENS_BT), clean)
    with tiny_stack.noise(0, "input", 1.0):
        assert not torch.allclose(tiny_stack(TOKENS_BT), clean)


def test_a_frozen_half_does_not_react(tiny_stack: DecoderStack) -> None:
    with tiny_stack.capture("feed_forward") as seen:
        tiny_stack(TOKENS_BT)
    kept = dict(seen)
    with restored(tiny_stack, kept), tiny_stack.capture("feed_forward") as frozen, tiny_stack.zero(0, "attention"):
        tiny_stack(TOKENS_BT)
    assert all(torch.equal(frozen[key], kept[key]) for key in kept)


def test_restoring_before_the_change_of_a_later_token_keeps_it_local(tiny_stack: DecoderStack) -> None:
    places_BT = torch.zeros(2, 4, dtype=torch.bool)
    places_BT[0, 2] = True
    with tiny_stack.capture("output") as seen:
        tiny_stack(TOKENS_BT)
    clean = dict(seen)
    with tiny_stack.edit(1, "output", at(places_BT, added(torch.ones(32)))), tiny_stack.capture("output") as after:
        tiny_stack(TOKENS_BT)
    assert torch.equal(after[3, "output"][1], clean[3, "output"][1])
    assert torch.equal(after[3, "output"][0, :2], clean[3, "output"][0, :2])
    assert not torch.equal(after[3, "output"][0, 2:], clean[3, "output"][0, 2:])


def test_routed_experts_have_no_neurons_of_their_own() -> None:
    row = LayerSpec(None, FeedForward(16, experts=4, experts_per_token=2))
    with pytest.raises(BadOption, match="routed experts"):
        random_stack(1, hidden=32, row=row).module(0, "neurons")
