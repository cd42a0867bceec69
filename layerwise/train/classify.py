"""Training small classifiers on labelled data: plainly, augmented, on attacked inputs, or with a loss of your own.

Shapes: B items of a batch, K classes; x_B has any shape after B.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from layerwise.data.labelled import Labelled
from layerwise.train.attack import Attack, classification_loss
from layerwise.train.loop import AfterStep, Optimizer, Recipe, train

Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""(model, inputs, labels) to a number to make small."""


def plain(model: nn.Module, x_B: Tensor, labels_B: Tensor) -> Tensor:
    """Mean cross-entropy, nats."""
    return classification_loss(model(x_B), labels_B)


def against(attack: Attack) -> Loss:
    """Cross-entropy on attacked inputs only: adversarial training. The attack sees the model in evaluation mode."""

    def loss(model: nn.Module, x_B: Tensor, labels_B: Tensor) -> Tensor:
        return plain(model, while_evaluating(model, attack, x_B, labels_B), labels_B)

    return loss


def while_evaluating(model: nn.Module, attack: Attack, x_B: Tensor, labels_B: Tensor) -> Tensor:
    """`attack` on the model in evaluation mode, which training mode then follows again if it was on."""
    training = model.training
    model.eval()
    try:
        return attack(model, x_B, labels_B)
    finally:
        model.train(training)


def augmented(change: Callable[[Tensor, torch.Generator], Tensor], seed: int, smooth: float = 0.0) -> Loss:
    """Cross-entropy with smoothed labels on inputs that `change` varies at random."""
    generator = torch.Generator().manual_seed(seed)

    def loss(model: nn.Module, x_B: Tensor, labels_B: Tensor) -> Tensor:
        return classification_loss(model(change(x_B, generator)), labels_B, smooth=smooth)

    return loss


def fit(
    model: nn.Module,
    data: Labelled,
    recipe: Recipe,
    loss: Loss = plain,
    *,
    optimizer: Optimizer | None = None,
    after: Sequence[AfterStep] = (),
) -> list[float]:
    """Train `model` in place and leave it in evaluation mode; the loss of every step.

    Batch order, dropout and attacks follow the recipe's seed and the loss's own; the global generator is
    left as it was. Raises as `layerwise.train.loop.train`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model.train()
        losses = train(
            [p for p in model.parameters() if p.requires_grad],
            lambda index_B: loss(model, data.x_N[index_B], data.labels_N[index_B]),
            torch.arange(len(data)),
            recipe,
            optimizer=optimizer,
            after=after,
        )
    model.eval()
    return losses


@torch.inference_mode()
def accuracy(model: nn.Module, data: Labelled) -> float:
    """Share of items whose largest logit is the label's; of a single logit, whose sign is."""
    right = 0
    for x_B, labels_B in data.batches():
        logits_BK = model(x_B)
        chosen_B = (logits_BK[:, 0] > 0).long() if logits_BK.shape[1] == 1 else logits_BK.argmax(1)
        right += int((chosen_B == labels_B).sum())
    return right / len(data)


def seeded(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    """A new module whose initial weights follow `seed`; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()
