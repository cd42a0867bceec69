"""One plain training loop: AdamW or another optimizer, warm-up and linear decay, clipping, seeded order."""

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


Optimizer = Callable[[Sequence[nn.Parameter], float], torch.optim.Optimizer]
"""Parameters and learning rate to an optimizer."""
AfterStep = Callable[[int], None]
"""A training-time instrument: called with the number of steps done, after each."""


def train(
    parameters: Sequence[nn.Parameter],
    loss: Callable[[Tensor], Tensor],
    tokens_NT: Tensor,
    recipe: Recipe,
    *,
    optimizer: Optimizer | None = None,
    after: Sequence[AfterStep] = (),
) -> list[float]:
    """Minimise `loss(tokens_BT)` over `parameters`; returns the loss of every step, nats per token.

    What is trained on need not be text: `tokens_NT` may hold rows of any kind, such as indices into a set.
    `optimizer` takes the place of AdamW, and every callable in `after` is told the steps done.

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
    chosen = (
        torch.optim.AdamW(parameters, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
        if optimizer is None
        else optimizer(parameters, recipe.learning_rate)
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(chosen, lambda step: _rate(step, recipe))
    losses: list[float] = []
    for tokens_BT in _batches(tokens_NT, recipe):
        value = loss(tokens_BT)
        if not bool(torch.isfinite(value)):
            raise BadOption(
                f"a loss of {float(value.detach())} at step {len(losses)}",
                expected="a finite loss",
                do=f"lower the learning rate ({recipe.learning_rate})",
            )
        chosen.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(parameters, recipe.clip)
        chosen.step()
        schedule.step()
        losses.append(float(value.detach()))
        for watch in after:
            watch(len(losses))
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
