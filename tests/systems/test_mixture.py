"""A mixture that learns, and its twins that are dense or route otherwise."""

from __future__ import annotations

import torch

from layerwise.systems.mixture import mixture, routed
from layerwise.train.heal import next_token_loss

TOKENS_NT = (torch.arange(24)[:, None] * 7 + torch.arange(16)) % 11


def test_training_lowers_the_loss_and_is_seeded() -> None:
    before, after, again = (mixture(TOKENS_NT, layers=2, experts=4, chosen=2, steps=steps, width=32)
                            for steps in (0, 12, 12))
    losses = [float(next_token_loss(stack, TOKENS_NT)) for stack in (before, after, again)]
    assert losses[1] < losses[0] - 0.5 and losses[1] == losses[2]


def test_the_dense_twin_is_as_wide_as_the_chosen_experts() -> None:
    routed_row, dense_row = (mixture(TOKENS_NT, layers=1, experts=experts, chosen=2, steps=0).spec.rows[0].feed_forward
                             for experts in (4, 0))
    assert routed_row is not None and dense_row is not None
    assert 2 * routed_row.width == dense_row.width and not dense_row.experts


def test_routing_otherwise_changes_logits_only_through_the_choice() -> None:
    stack = mixture(TOKENS_NT, layers=2, experts=4, chosen=1, steps=0)
    same, other = routed(stack, 1), routed(stack, 2)
    assert torch.equal(same(TOKENS_NT[:2]), stack(TOKENS_NT[:2]))
    assert not torch.allclose(other(TOKENS_NT[:2]), stack(TOKENS_NT[:2]))
    assert stack.spec.rows[0].feed_forward.experts_per_token == 1  # type: ignore[union-attr]
