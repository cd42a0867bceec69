"""How far several answers to one question agree.

Shapes: N questions, D draws (answers to one question), K possible answers; answers are numbers below K.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import one_hot


def majority(answers_ND: Tensor, choices: int) -> tuple[Tensor, Tensor]:
    """The answer given most often, the smallest of several, and its share of the draws; both [N]."""
    counts_NK = one_hot(answers_ND, choices).sum(1)
    return counts_NK.argmax(-1), counts_NK.amax(-1) / answers_ND.shape[1]


def dispersion(answers_ND: Tensor, choices: int) -> Tensor:
    """Chance that two different draws disagree, [N] float64: the same on average for any number of draws."""
    counts_NK, draws = one_hot(answers_ND, choices).sum(1).double(), answers_ND.shape[1]
    agreeing_N: Tensor = (counts_NK * (counts_NK - 1)).sum(-1) / (draws * (draws - 1))
    return 1 - agreeing_N


def chance_dispersion(answers_ND: Tensor, choices: int) -> float:
    """The dispersion if every draw came from the answers to all questions together: what base rates alone give."""
    share_K = torch.bincount(answers_ND.flatten(), minlength=choices).double() / answers_ND.numel()
    return float(1 - share_K.square().sum())
