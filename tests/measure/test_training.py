"""Rotation and criticality by hand, and as callbacks of the loop."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from layerwise.data.moons import moons
from layerwise.errors import BadOption
from layerwise.measure.training import Criticality, Rotation, Turning, cosine_distance, tangent
from layerwise.nets.classifiers import mlp
from layerwise.train.classify import classification_loss, fit, seeded
from layerwise.train.layca import Layca
from layerwise.train.loop import Recipe


def test_cosine_distance_by_hand() -> None:
    a = torch.tensor([[1.0, 0.0]])
    turned = [cosine_distance(a, torch.tensor([b])) for b in ([3.0, 0.0], [0.0, 2.0], [-1.0, 0.0], [1.0, 1.0])]
    assert turned == pytest.approx([0, 1, 2, 1 - 0.5**0.5])


def test_rotation_is_from_where_it_began() -> None:
    net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2))
    net[0].weight.data, before = torch.eye(2), net[1].weight.detach().clone()
    rotation = Rotation(net)
    net[0].weight.data = torch.eye(2).flip(0)
    net[1].bias.data += 5
    net[1].weight.data = 3 * before
    assert list(rotation.now().values()) == pytest.approx([1.0, 0.0])


def test_tangents_by_hand() -> None:
    assert tangent(torch.tensor([2.0, 1.0]), torch.tensor([1.0, 0.0])) == pytest.approx(0.5)
    assert tangent(torch.tensor([5.0, 0.0]), torch.tensor([1.0, 0.0])) == pytest.approx(0.0)
    assert tangent(torch.tensor([0.0, 3.0]), torch.tensor([1.0, 0.0])) == math.inf
    assert math.isnan(tangent(torch.zeros(2), torch.ones(2))) and math.isnan(tangent(torch.ones(2), torch.zeros(2)))


@pytest.mark.parametrize("every", [1, 2])
def test_a_step_of_layca_turns_every_layer_by_its_rate(every: int) -> None:
    torch.manual_seed(0)
    net = mlp((6, 8, 3), bias=False)
    turning = Turning(net, every)
    optimizer = Layca(list(net.parameters()), [0.1, 0.3])
    for step in range(1, 5):
        net(torch.randn(5, 6)).square().sum().backward()
        optimizer.step()
        turning(step)
    assert [step for step, _ in turning.curve] == list(range(every, 5, every))
    for _, row in turning.curve:
        assert row == pytest.approx([0.1, 0.3], rel=1e-3)


def test_callbacks_run_with_the_loop() -> None:
    data, net = moons(64, 0), seeded(lambda: mlp((2, 8, 1)), 0)

    def loss() -> float:
        with torch.no_grad():
            return float(classification_loss(net(data.x_N), data.labels_N))

    rotation, criticality = Rotation(net, every=10), Criticality(net, loss, every=15)
    fit(net, data, Recipe(steps=30, batch=32, learning_rate=1e-2), after=[rotation, criticality])
    assert [step for step, _ in rotation.curve] == [10, 20, 30]
    assert [step for step, _ in criticality.curve] == [15, 30]
    assert all(0 < turn < 1 for turn in rotation.curve[-1][1])


def test_rewinding_a_layer_that_has_not_changed_costs_nothing() -> None:
    net = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
    for layer in net:
        nn.init.ones_(layer.weight)

    def loss() -> float:
        return float(net(torch.ones(1, 1)).detach())

    criticality = Criticality(net, loss)
    net[1].weight.data *= 3
    assert criticality.now() == {"0": 0, "1": -2} and loss() == 3


def test_a_zero_weight_has_no_direction() -> None:
    layer = nn.Linear(2, 2)
    nn.init.zeros_(layer.weight)
    with pytest.raises(BadOption, match="rotation of 0"):
        Rotation(nn.Sequential(layer))
