"""Adversarial training with a penalty on how much chosen layers change under attack.

J(theta, x', y) + sum over layers of gamma CM_l(x, x'), gradients through both branches (arXiv 2202.02626, AT-LR).

Shapes: B items; x_B has any shape after B.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from layerwise.measure.sustainability import reading, relative_errors
from layerwise.train.attack import Attack, classification_loss
from layerwise.train.classify import Loss, while_evaluating


def layer_regularized(attack: Attack, penalties: Mapping[nn.Module, float], *, fixed_scale: bool = False) -> Loss:
    """Cross-entropy on attacked inputs plus `gamma` times the relative error of each place in `penalties`.

    Both branches run in the model's own mode, after the attack saw it in evaluation mode.
    """
    places, gammas_L = list(penalties), torch.tensor(list(penalties.values()))

    def loss(model: nn.Module, x_B: Tensor, labels_B: Tensor) -> Tensor:
        changed_B = while_evaluating(model, attack, x_B, labels_B)
        with reading(places) as seen:
            model(x_B)
            logits_BK = model(changed_B)
        clean, changed = [before for before, _ in seen], [after for _, after in seen]
        errors_L = relative_errors(clean, changed, fixed_scale=fixed_scale)
        return classification_loss(logits_BK, labels_B) + (errors_L * gammas_L).sum()

    return loss
