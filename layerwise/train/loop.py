"""One plain training loop: AdamW, warm-up and linear decay, gradient clipping, seeded order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from layerwise.errors import BadData, BadOption


@dataclass(frozen=True)
class Recipe:
    """How long and how fast to train. `batch` counts blocks of text in one step."""

    steps: int = 100
    batch: int = 4
    learning_rate: float = 1e-4
    warmup: int = 10
    weight_decay: float = 0.0
    clip: float = 1.0
    seed: int = 0


def train(
    parameters: Sequence[nn.Parameter], loss: Callable[[Tensor], Tensor], tokens_NT: Tensor, recipe: Recipe
) -> list[float]:
    """Minimise `loss(tokens_BT)` over `parameters`; returns the loss of every step, nats per token.

    Raises BadData where there are fewer blocks than one batch, and BadOption where nothing can be trained
    or the loss stops being finite.
    """
    if len(tokens_NT) < recipe.batch:
        raise BadData(
            f"{len(tokens_NT)} blocks of text",
            expected=f"at least one batch of {recipe.batch}",
            do="give more text or a smaller batch",
        )
    if not parameters:
        raise BadOption("no parameters to train", expected="at least one", do="choose layers to train")
    optimizer = torch.optim.AdamW(parameters, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, recipe))
    losses: list[float] = []
    for tokens_BT in _batches(tokens_NT, recipe):
        value = loss(tokens_BT)
        if not bool(torch.isfinite(value)):
            raise BadOption(
                f"a loss of {float(value.detach())} at step {len(losses)}",
                expected="a finite loss",
                do=f"lower the learning rate ({recipe.learning_rate})",
            )
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(parameters, recipe.clip)
        optimizer.step()
        schedule.step()
        losses.append(float(value.detach()))
    return losses


def _rate(step: int, recipe: Recipe) -> float:
    if step < recipe.warmup:
        return (step + 1) / recipe.warmup
    return max(0.0, (recipe.steps - step) / max(1, recipe.steps - recipe.warmup))


def _batches(tokens_NT: Tensor, recipe: Recipe) -> Iterator[Tensor]:
    """Exactly `recipe.steps` batches: seeded permutations of the blocks, one after another."""
    generator = torch.Generator().manual_seed(recipe.seed)
    order: list[int] = []
    for _ in range(recipe.steps):
        if len(order) < recipe.batch:
            order += torch.randperm(len(tokens_NT), generator=generator).tolist()
        chosen, order = order[: recipe.batch], order[recipe.batch :]
        yield tokens_NT[chosen]
