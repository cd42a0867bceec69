"""Networks trained together equal networks trained alone, and each learns its own classes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from layerwise.data.labelled import Labelled
from layerwise.errors import BadData
from layerwise.train.population import Lessons, Population, by_class, graded, taught


@pytest.fixture
def items() -> Tensor:
    """Four classes on four axes."""
    generator = torch.Generator().manual_seed(0)
    return torch.eye(4)[:, None] + 0.1 * torch.randn(4, 20, 4, generator=generator)


def lessons(classes: list[list[bool]], steps: list[int], rates: list[float]) -> Lessons:
    return Lessons(torch.tensor(classes), torch.tensor(steps), torch.tensor(rates), batch=8)


def test_outputs_equal_each_network_alone() -> None:
    population, x = Population.fresh(3, (4, 6, 2), 0), torch.randn(3, 5, 4)
    for k in range(3):
        hidden = F.relu(x[k] @ population.weights[0][k].T + population.biases[0][k])
        alone = hidden @ population.weights[1][k].T + population.biases[1][k]
        assert torch.allclose(population(x)[k], alone, atol=1e-6)


def test_one_step_equals_autograd_by_hand(items: Tensor) -> None:
    population = Population.fresh(1, (4, 4), 0)
    constant = items[:, :1]
    after = taught(population, constant, lessons([[True, False, False, False]], [1], [0.5]), 0)
    weight = population.weights[0][0].clone().requires_grad_(True)
    loss = -(constant[0, 0] @ weight.T)[:1].log_softmax(0)[0]
    assert float(loss.detach()) == 0
    assert torch.allclose(after.weights[0][0], population.weights[0][0])
    both = taught(population, constant, lessons([[True, True, False, False]], [1], [0.5]), 0)
    generator = torch.Generator().manual_seed(0)
    labels = torch.multinomial(torch.tensor([1.0, 1, 0, 0]), 8, True, generator=generator)
    F.cross_entropy(constant[labels, 0] @ weight[:2].T, labels).backward()
    assert weight.grad is not None
    assert torch.allclose(both.weights[0][0], population.weights[0][0] - 0.5 * weight.grad, atol=1e-6)


def test_networks_learn_their_own_classes(items: Tensor) -> None:
    wanted = [[True, True, False, False], [False, False, True, True], [True] * 4]
    after = taught(Population.fresh(3, (4, 16, 4), 0), items, lessons(wanted, [80] * 3, [0.1] * 3), 0)
    assert graded(after, items, torch.tensor(wanted)).min() > 0.95


def test_a_network_stops_when_its_lessons_end(items: Tensor) -> None:
    population = Population.fresh(2, (4, 4), 0)
    everything = [[True] * 4] * 2
    short = taught(population, items, lessons(everything, [3, 3], [0.1, 0.1]), 0)
    mixed = taught(population, items, lessons(everything, [3, 9], [0.1, 0.1]), 0)
    assert torch.equal(short.weights[0][0], mixed.weights[0][0])
    assert not torch.equal(short.weights[0][1], mixed.weights[0][1])


def test_the_roots_are_left_alone(items: Tensor) -> None:
    root = Population.fresh(1, (4, 4), 0)
    before = root.weights[0].clone()
    children = root.picked([0, 0])
    taught(children, items, lessons([[True] * 4] * 2, [5, 5], [0.1, 0.1]), 0)
    assert torch.equal(root.weights[0], before)
    assert torch.equal(children.weights[0][1], before[0])
    assert torch.equal(children.with_head(Population.fresh(2, (4, 4), 1)).weights[-1],
                       Population.fresh(2, (4, 4), 1).weights[-1])


def test_items_are_grouped_by_class() -> None:
    data = Labelled(torch.arange(10.0).view(5, 2), torch.tensor([1, 0, 1, 0, 0]), 2, "d")
    assert by_class(data).tolist() == [[[2, 3], [6, 7]], [[0, 1], [4, 5]]]
    with pytest.raises(BadData, match="no item of class 2"):
        by_class(Labelled(data.x_N, data.labels_N, 3, "d"))
