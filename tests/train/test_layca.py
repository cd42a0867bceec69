"""Layca turns every layer by its own angle and keeps its length, whatever the updates."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from layerwise.data.moons import moons
from layerwise.measure.training import cosine_distance
from layerwise.nets.classifiers import mlp
from layerwise.train.classify import accuracy, fit, seeded
from layerwise.train.layca import Base, Layca, plain_gradient, rates, turned
from layerwise.train.loop import Recipe


def test_a_turn_by_hand() -> None:
    found = turned(torch.tensor([2.0, 0.0]), torch.tensor([7.0, -3.0]), 1.0)
    assert torch.allclose(found, torch.tensor([2.0, 2.0]) / math.sqrt(2))


def test_an_update_along_the_weight_turns_nothing() -> None:
    weight = torch.tensor([0.0, 3.0])
    assert torch.equal(turned(weight, -5 * weight, 0.3), weight)


def test_rates_by_hand() -> None:
    assert rates(3, 0.1, 0.0) == [0.1] * 3
    assert rates(3, 1.0, 0.5) == pytest.approx([0.5**5, 0.5**2.5, 1])
    assert rates(3, 1.0, -0.5) == pytest.approx([1, 0.5**2.5, 0.5**5])
    assert rates(1, 0.1, 0.5) == [pytest.approx(0.1 * 0.5**5)]


@pytest.mark.parametrize("base", [plain_gradient, lambda p: torch.optim.Adam(p, lr=1e-3)], ids=["sgd", "adam"])
@pytest.mark.parametrize("scale", [1.0, 1e-6])
def test_every_step_turns_by_the_rate_whatever_the_gradient(base: Base, scale: float) -> None:
    torch.manual_seed(0)
    net = mlp((3, 5, 2), bias=False).double()
    weights = list(net.parameters())
    optimizer = Layca(weights, [0.1, 0.02], base)
    for _ in range(5):
        before = [weight.detach().clone() for weight in weights]
        optimizer.zero_grad()
        (scale * net(torch.randn(4, 3).double()).square().sum()).backward()
        optimizer.step()
        for weight, old, rho in zip(weights, before, (0.1, 0.02), strict=True):
            assert float(weight.detach().norm()) == pytest.approx(float(old.norm()), rel=1e-9)
            assert cosine_distance(weight, old) == pytest.approx(1 - math.cos(math.atan(rho)), rel=1e-6)


def test_small_updates_of_large_weights_keep_their_direction() -> None:
    weight = nn.Parameter(torch.tensor([1e4, 0.0, 0.0]))
    optimizer = Layca([weight], [0.5])
    weight.grad = torch.tensor([0.0, 1e-4, -1e-4])
    optimizer.step()
    assert float(weight[1].detach()) == pytest.approx(-float(weight[2].detach())) and float(weight[1].detach()) < -1e3


def test_it_learns_in_the_loop_with_its_schedule() -> None:
    data, net = moons(300, 0), seeded(lambda: mlp((2, 32, 32, 2), bias=False, norm=True), 0)
    start = [float(p.detach().norm()) for p in net.parameters()]
    recipe = Recipe(steps=200, batch=50, learning_rate=1.0)
    fit(net, data, recipe, optimizer=lambda p, _: Layca(p, rates(len(p), 0.03, 0.0)))
    assert accuracy(net, data) > 0.85
    assert [float(p.detach().norm()) for p in net.parameters()] == pytest.approx(start, rel=1e-4)


def test_rounding_of_a_long_weight_is_no_update() -> None:
    weight = 30 * torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(turned(weight, 2 * weight, 0.1), weight)
    assert torch.equal(turned(weight, torch.zeros_like(weight), 0.1), weight)
