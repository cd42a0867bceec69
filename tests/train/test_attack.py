"""Attacks stay in their ball, find what can be found by hand, and leave the model alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from layerwise.data.glyphs import glyphs
from layerwise.data.labelled import Labelled
from layerwise.data.moons import moons
from layerwise.nets.classifiers import mlp
from layerwise.train.attack import FGSM, PGD, Attack, GaussianNoise, attacked, classification_loss, gradient
from layerwise.train.classify import accuracy, against, augmented, fit, plain, seeded
from layerwise.train.loop import Recipe


def linear() -> nn.Linear:
    """logit = x0 - 2 x1."""
    layer = nn.Linear(2, 1, bias=False)
    layer.weight.data = torch.tensor([[1.0, -2.0]])
    return layer


@pytest.mark.parametrize("attack", [FGSM(0.1, None), PGD(0.1, 20, bounds=None), PGD(0.1, 20, restarts=2, bounds=None)])
def test_a_linear_model_is_attacked_at_the_corner(attack: Attack) -> None:
    x, labels = torch.randn(5, 2), torch.tensor([0, 1, 0, 1, 1])
    expected = x + 0.1 * torch.tensor([1.0, -1.0]) * (1 - 2.0 * labels)[:, None]
    assert torch.allclose(attack(linear(), x, labels), expected, atol=1e-6)


def test_the_ball_and_the_bounds_are_kept() -> None:
    data = glyphs(8, 0, side=8)
    model = seeded(lambda: mlp((64, 16, 10)), 0)
    for attack in (FGSM(0.3), PGD(0.3, steps=5, rate=1.0)):
        changed = attack(model, data.x_N, data.labels_N)
        assert float((changed - data.x_N).abs().max()) <= 0.3 + 1e-6
        assert float(changed.min()) >= 0 and float(changed.max()) <= 1
        assert not changed.requires_grad
    assert all(p.grad is None for p in model.parameters())


def test_restarts_only_raise_the_loss() -> None:
    data, model = glyphs(32, 0, side=8), seeded(lambda: mlp((64, 16, 10)), 0)
    found = [PGD(0.1, 2, restarts=r)(model, data.x_N, data.labels_N) for r in (1, 4)]
    losses = [classification_loss(model(x), data.labels_N, "none").detach() for x in found]
    assert bool((losses[1] >= losses[0] - 1e-6).all()) and float(losses[1].sum()) > float(losses[0].sum())


def test_noise_has_the_size_of_the_attack() -> None:
    data, model = glyphs(8, 0, side=8), seeded(lambda: mlp((64, 16, 10)), 0)
    attack = FGSM(0.1)
    changed = [a(model, data.x_N, data.labels_N) for a in (attack, GaussianNoise(attack))]
    sizes = [(x - data.x_N).flatten(1).norm(dim=1) for x in changed]
    assert torch.allclose(*sizes, rtol=1e-4)


def test_the_gradient_is_that_of_finite_differences() -> None:
    model, x, labels = mlp((3, 5, 4), nn.Tanh).double(), torch.randn(2, 3).double(), torch.tensor([1, 3])
    step = 1e-6 * torch.eye(3).double()[1]
    change = classification_loss(model(x + step), labels, "sum") - classification_loss(model(x - step), labels, "sum")
    assert float(gradient(model, x, labels)[:, 1].sum()) == pytest.approx(float(change.detach()) / 2e-6, rel=1e-5)


def test_one_logit_asks_yes_or_no() -> None:
    logits, labels = torch.tensor([[2.0], [-1.0]]), torch.tensor([1, 0])
    two = torch.cat([torch.zeros(2, 1), logits], 1)
    assert float(classification_loss(logits, labels)) == pytest.approx(float(classification_loss(two, labels)))
    data = Labelled(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), labels, 2, "two")
    assert accuracy(linear(), data) == 1


def test_training_learns_and_repeats() -> None:
    data, recipe = moons(300, 0), Recipe(steps=150, batch=50, learning_rate=1e-2)
    state = torch.random.get_rng_state()
    models = [seeded(lambda: mlp((2, 16, 1)), 3) for _ in range(2)]
    losses = [fit(model, data, recipe) for model in models]
    assert losses[0] == losses[1] and torch.equal(torch.random.get_rng_state(), state)
    assert accuracy(models[0], data) > 0.85 and not models[0].training


def test_adversarial_training_resists() -> None:
    data, attack = moons(400, 0, noise=0.1), PGD(0.25, 5, bounds=None)
    recipe = Recipe(steps=250, batch=50, learning_rate=1e-2)
    robust = []
    for loss in (plain, against(attack)):
        model = seeded(lambda: mlp((2, 32, 32, 1)), 0)
        fit(model, data, recipe, loss)
        robust.append(accuracy(model, attacked(model, data, attack)))
    assert robust[1] > robust[0]


def test_attacks_while_training_see_the_model_in_evaluation() -> None:
    data, seen = moons(64, 0), []
    model = mlp((2, 4, 1))

    def attack(net: nn.Module, x: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        seen.append(net.training)
        return x

    fit(model, data, Recipe(steps=2, batch=8), against(attack))
    assert seen == [False, False]


def test_callbacks_are_told_every_step() -> None:
    told: list[int] = []
    fit(mlp((2, 4, 1)), moons(64, 0), Recipe(steps=3, batch=8), augmented(lambda x, _: x, 0), after=[told.append])
    assert told == [1, 2, 3]
