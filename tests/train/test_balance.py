"""The balance loss: one where experts are used alike, more where a few get all, and less after training with it."""

from __future__ import annotations

import pytest
import torch

from layerwise.nets.feed_forward import Experts
from layerwise.spec import FeedForward
from layerwise.train.balance import imbalance, watched

BODY = Experts(FeedForward(4, experts=4, experts_per_token=1), 4)


def test_values_by_hand() -> None:
    even_NE = 50.0 * torch.eye(4)
    assert float(imbalance(BODY, even_NE)) == pytest.approx(1.0)
    assert float(imbalance(BODY, even_NE[:1].expand(4, 4))) == pytest.approx(4.0)
    assert float(imbalance(BODY, torch.zeros(4, 4))) == pytest.approx(1.0)


def test_descent_spreads_the_choices() -> None:
    logits_NE = torch.randn(64, 4, generator=torch.Generator().manual_seed(0)) + torch.tensor([1.0, 0, 0, 0])
    before = float(imbalance(BODY, logits_NE))
    logits_NE.requires_grad_()
    for _ in range(100):
        grad_NE, = torch.autograd.grad(imbalance(BODY, logits_NE), logits_NE)
        with torch.no_grad():
            logits_NE -= 5 * grad_NE
    assert before > 1.1 and float(imbalance(BODY, logits_NE.detach())) < before - 0.05


def test_only_what_runs_inside_is_watched() -> None:
    pair = torch.nn.Sequential(BODY, torch.nn.Linear(4, 4), BODY)
    x_NC = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    with watched(pair) as found:
        pair(x_NC)
    pair(x_NC)
    assert len(found) == 2 and all(value.requires_grad for value in found)
