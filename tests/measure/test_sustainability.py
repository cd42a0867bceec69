"""Relative errors of known networks, the rule that picks layers, and the penalty they make."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from layerwise.data.moons import moons
from layerwise.errors import BadModel
from layerwise.measure.sustainability import probes, reading, relative_errors, sustainability, vulnerable
from layerwise.nets.classifiers import convnet, mlp
from layerwise.train.attack import FGSM, classification_loss
from layerwise.train.classify import fit, seeded
from layerwise.train.loop import Recipe
from layerwise.train.regularized import layer_regularized


def test_layers_are_read_after_their_activation() -> None:
    net = mlp((2, 3, 4, 1), nn.ELU)
    assert {path: type(place) for path, place in probes(net).items()} == {"1": nn.ELU, "3": nn.ELU, "5": nn.Linear}
    kinds = [type(place) for place in probes(convnet((2, 3), 4, 8)).values()]
    assert kinds == [nn.ReLU, nn.ReLU, nn.ReLU, nn.Linear]
    with pytest.raises(BadModel, match="without linear"):
        probes(nn.Sequential(nn.ReLU()))


def test_relative_errors_by_hand() -> None:
    net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False))
    net[0].weight.data, net[1].weight.data = torch.eye(2), torch.tensor([[1.0, 1.0]])
    clean, changed = torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 3.0]])
    errors = sustainability(net, [(clean, changed)], list(net))
    assert errors[0].tolist() == pytest.approx([1 / 5, 1 / 7])


def test_equal_inputs_have_no_error_and_hooks_are_gone() -> None:
    net, x = mlp((2, 5, 1)), torch.randn(4, 2)
    places = list(probes(net).values())
    assert sustainability(net, [(x, x)], places).tolist() == [[0.0, 0.0]]
    with pytest.raises(ZeroDivisionError), reading(places):
        _ = 1 / 0
    assert not any(place._forward_hooks for place in places)


def test_the_rule_by_hand() -> None:
    errors = torch.tensor([[0.1, 0.9, 0.2, 0.6], [0.1, 0.7, 0.2, 0.6]])
    assert vulnerable(errors, 0.0) == [1, 3] and vulnerable(errors, 1.0) == [1] and vulnerable(errors, 9.0) == []


def test_a_fixed_scale_gives_no_gradient_to_the_denominator() -> None:
    clean, changed = torch.tensor([3.0, 4.0], requires_grad=True), torch.tensor([0.0, 0.0])
    free = torch.autograd.grad(relative_errors([clean], [changed]).sum(), clean)[0]
    fixed = torch.autograd.grad(relative_errors([clean], [changed], fixed_scale=True).sum(), clean)[0]
    assert torch.allclose(free, torch.zeros(2), atol=1e-6)
    assert torch.allclose(fixed, torch.tensor([3.0, 4.0]) / 25)


def test_the_loss_is_the_sum_of_its_parts() -> None:
    data, attack = moons(20, 0), FGSM(0.2, None)
    net = seeded(lambda: mlp((2, 6, 6, 1), nn.ELU), 0)
    places = list(probes(net).values())
    found = layer_regularized(attack, {places[1]: 0.5, places[0]: 2.0})(net, data.x_N, data.labels_N)
    changed = attack(net, data.x_N, data.labels_N)

    def after(layers: int, x: Tensor) -> Tensor:
        return net[: 1 + 2 * layers](x)

    errors = [(after(k, data.x_N) - after(k, changed)).norm() / after(k, data.x_N).norm() for k in (1, 2)]
    expected = classification_loss(net(changed), data.labels_N) + 2.0 * errors[0] + 0.5 * errors[1]
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)


def test_the_penalty_lowers_what_it_penalises() -> None:
    data, attack = moons(400, 0), FGSM(0.3, None)
    errors = []
    for gamma in (0.0, 3.0):
        net = seeded(lambda: mlp((2, 16, 16, 1), nn.ELU), 0)
        places = list(probes(net).values())
        fit(net, data, Recipe(steps=120, batch=50, learning_rate=1e-2), layer_regularized(attack, {places[1]: gamma}))
        changed = attack(net, data.x_N, data.labels_N)
        errors.append(float(sustainability(net, [(data.x_N, changed)], [places[1]])))
    assert errors[1] < 0.7 * errors[0]
