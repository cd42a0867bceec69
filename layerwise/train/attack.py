"""Inputs that raise a classifier's loss: FGSM, PGD with restarts, and noise of the same size as a control.

All attacks are bounded by `eps` in every coordinate. FGSM: Goodfellow et al. 2015. PGD: Madry et al. 2018,
from a random start inside the ball, a signed step of `rate * eps` and a projection, `steps` times. With a
seed an attack is the same at every call; with None it draws from torch's global generator, as training should.

Shapes: B items, K classes; x_B has any shape after B.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layerwise.data.labelled import Labelled

Bounds = tuple[float, float] | None
"""The least and largest value an input may take; None where there is no such limit."""
Attack = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""(model, inputs, labels) to changed inputs."""


@dataclass(frozen=True)
class FGSM:
    """x + eps sign(dloss/dx)."""

    eps: float
    bounds: Bounds = (0.0, 1.0)

    def __call__(self, model: nn.Module, x_B: Tensor, labels_B: Tensor) -> Tensor:
        return _bounded(x_B + self.eps * gradient(model, x_B, labels_B).sign(), self.bounds)


@dataclass(frozen=True)
class PGD:
    """Signed steps within the ball, from `restarts` random starts; the start with the largest loss wins an item."""

    eps: float
    steps: int = 7
    rate: float = 0.25
    restarts: int = 1
    bounds: Bounds = (0.0, 1.0)
    seed: int | None = 0

    def __call__(self, model: nn.Module, x_B: Tensor, labels_B: Tensor) -> Tensor:
        generator = _generator(self.seed)
        best_B, highest_B = x_B, torch.full((len(x_B),), -math.inf, device=x_B.device)
        for _ in range(self.restarts):
            start_B = 2 * torch.rand(x_B.shape, generator=generator) - 1
            found_B = self._climb(model, x_B, labels_B, x_B + self.eps * start_B.to(x_B))
            if self.restarts == 1:
                return found_B
            with torch.no_grad():
                loss_B = classification_loss(model(found_B), labels_B, "none")
            better_B = loss_B > highest_B
            best_B = torch.where(better_B.view(-1, *[1] * (x_B.dim() - 1)), found_B, best_B)
            highest_B = torch.maximum(highest_B, loss_B)
        return best_B

    def _climb(self, model: nn.Module, x_B: Tensor, labels_B: Tensor, at_B: Tensor) -> Tensor:
        at_B = _bounded(at_B, self.bounds)
        for _ in range(self.steps):
            at_B = at_B + self.rate * self.eps * gradient(model, at_B, labels_B).sign()
            at_B = _bounded(torch.clamp(at_B, x_B - self.eps, x_B + self.eps), self.bounds)
        return at_B


@dataclass(frozen=True)
class GaussianNoise:
    """Noise as a control: in every item of the same Euclidean norm as `attack` would give it."""

    attack: Attack
    seed: int | None = 0

    def __call__(self, model: nn.Module, x_B: Tensor, labels_B: Tensor) -> Tensor:
        change_B = (self.attack(model, x_B, labels_B) - x_B).flatten(1)
        noise_B: Tensor = torch.randn(change_B.shape, generator=_generator(self.seed)).to(x_B)
        noise_B = noise_B * change_B.norm(dim=1, keepdim=True) / noise_B.norm(dim=1, keepdim=True)
        return x_B + noise_B.view_as(x_B)


def gradient(model: nn.Module, x_B: Tensor, labels_B: Tensor) -> Tensor:
    """Gradient of the summed loss with respect to the inputs; parameters are left without gradients."""
    with torch.enable_grad():
        x_B = x_B.detach().requires_grad_()
        loss = classification_loss(model(x_B), labels_B, "sum")
        gradient_B: Tensor = torch.autograd.grad(loss, x_B)[0]
    return gradient_B


def classification_loss(logits_BK: Tensor, labels_B: Tensor, reduction: str = "mean", smooth: float = 0.0) -> Tensor:
    """Cross-entropy, nats; of a single logit, that of a yes-or-no question."""
    if logits_BK.shape[-1] == 1:
        return F.binary_cross_entropy_with_logits(logits_BK[:, 0], labels_B.to(logits_BK), reduction=reduction)
    return F.cross_entropy(logits_BK, labels_B, reduction=reduction, label_smoothing=smooth)


def attacked(model: nn.Module, data: Labelled, attack: Attack) -> Labelled:
    """The data as `attack` changes it, for `model` in evaluation mode."""
    model.eval()
    changed = [attack(model, x_B, labels_B) for x_B, labels_B in data.batches()]
    return replace(data, x_N=torch.cat(changed), name=f"{data.name} under {attack}")


def _bounded(x_B: Tensor, bounds: Bounds) -> Tensor:
    x_B = x_B.detach()
    return x_B if bounds is None else x_B.clamp(*bounds)


def _generator(seed: int | None) -> torch.Generator | None:
    return None if seed is None else torch.Generator().manual_seed(seed)
