"""The loop does what its recipe says: rates, order, clipping, and nothing to parameters it was not given."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from layerwise.errors import BadData, BadOption
from layerwise.train.loop import Recipe, train

BLOCKS = torch.arange(12).view(6, 2)


def run(recipe: Recipe, blocks_NT: Tensor = BLOCKS) -> tuple[Tensor, list[list[int]]]:
    """A parameter after training towards 3, and the first tokens of every batch it saw."""
    weight = nn.Parameter(torch.zeros(()))
    seen: list[list[int]] = []

    def loss(tokens_BT: Tensor) -> Tensor:
        seen.append(tokens_BT[:, 0].tolist())
        return (weight - 3) ** 2

    train([weight], loss, blocks_NT, recipe)
    return weight.detach(), seen


def test_it_minimises() -> None:
    weight, _ = run(Recipe(steps=200, learning_rate=0.1))
    assert float(weight) == pytest.approx(3, abs=0.05)


def test_losses_are_those_before_each_step() -> None:
    weight = nn.Parameter(torch.zeros(()))
    losses = train([weight], lambda _: (weight - 3) ** 2, BLOCKS, Recipe(steps=3, learning_rate=0.5, warmup=0))
    assert losses[0] == 9 and losses == sorted(losses, reverse=True) and len(losses) == 3


def test_the_first_step_of_adamw_is_the_warmed_rate() -> None:
    weight, _ = run(Recipe(steps=1, learning_rate=0.5, warmup=5))
    assert float(weight) == pytest.approx(0.1, rel=1e-4)


def test_rates_rise_then_fall_to_zero() -> None:
    """A constant gradient makes AdamW's steps equal the rates."""
    weight = nn.Parameter(torch.zeros((), dtype=torch.float64))
    places = [0.0]

    def loss(_: Tensor) -> Tensor:
        places.append(float(weight.detach()))
        return -weight

    train([weight], loss, BLOCKS, Recipe(steps=6, learning_rate=1.0, warmup=2))
    steps = [after - before for before, after in zip(places[1:], [*places[2:], float(weight.detach())], strict=True)]
    assert steps == pytest.approx([0.5, 1.0, 1.0, 0.75, 0.5, 0.25], rel=1e-5)


def test_every_block_is_seen_once_before_any_is_seen_twice() -> None:
    _, seen = run(Recipe(steps=3, batch=4))
    first = [block for batch in seen for block in batch][:6]
    assert sorted(first) == BLOCKS[:, 0].tolist()


def test_the_seed_sets_the_order_and_nothing_else() -> None:
    state = torch.random.get_rng_state()
    orders = [run(Recipe(steps=4, batch=2, seed=seed))[1] for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]
    assert torch.equal(torch.random.get_rng_state(), state)


def test_gradients_are_clipped() -> None:
    weight = nn.Parameter(torch.zeros(2))
    gradients: list[float] = []
    weight.register_post_accumulate_grad_hook(lambda p: gradients.append(float(p.grad.norm())))  # type: ignore[union-attr]
    train([weight], lambda _: (weight * 1000).sum(), BLOCKS, Recipe(steps=1, clip=0.25))
    assert gradients[0] > 1000 and float(weight.grad.norm()) == pytest.approx(0.25, rel=1e-4)  # type: ignore[union-attr]


def test_too_little_text_is_refused() -> None:
    with pytest.raises(BadData, match="6 blocks"):
        run(Recipe(batch=7))


def test_nothing_to_train_is_refused() -> None:
    with pytest.raises(BadOption, match="no parameters"):
        train([], lambda _: torch.zeros(()), BLOCKS, Recipe())


def test_a_loss_that_is_not_finite_stops_before_it_does_harm() -> None:
    weight = nn.Parameter(torch.ones(()))
    with pytest.raises(BadOption, match="nan at step 0"):
        train([weight], lambda _: weight * float("nan"), BLOCKS, Recipe())
    assert float(weight.detach()) == 1
