"""How well a number, or a straight line through hidden states, tells two groups apart.

Shapes: N points, M points to judge, C dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
from torch import Tensor

from layerwise.errors import BadData


def auroc(scores_N: Tensor, positive_N: Tensor) -> float:
    """Chance that a positive scores above a negative, ties counting half; nan where one group is empty."""
    ordered = scores_N.double().unique(return_inverse=True)[1]
    above = torch.bincount(ordered[positive_N.bool()], minlength=int(ordered.max()) + 1).double()
    below = torch.bincount(ordered[~positive_N.bool()], minlength=len(above)).double()
    pairs = float(above.sum() * below.sum())
    wins = float((above * (below.cumsum(0) - below / 2)).sum())
    return wins / pairs if pairs else math.nan


def ridge_direction(points_NC: Tensor, positive_N: Tensor, ridge: float = 1.0) -> tuple[Tensor, Tensor]:
    """Centre [C] and direction [C] of the least-squares separator of standardized points.

    The ridge is in units of the mean squared length of a point; solved over points or over dimensions,
    whichever are fewer. Raises BadData where all points are of one group.
    """
    if len(positive_N.bool().unique()) < 2:
        raise BadData(f"{len(points_NC)} points of a single class", expected="points of two classes",
                      do="give items answered right and items answered wrong, or labels of both kinds")
    x_NC = points_NC.double()
    centre_C, scale_C = x_NC.mean(0), x_NC.std(0).clamp(min=1e-12)
    x_NC = (x_NC - centre_C) / scale_C
    y_N = positive_N.double() - positive_N.double().mean()
    strength = ridge * float(x_NC.square().sum(1).mean())
    if len(x_NC) < x_NC.shape[1]:
        gram_NN = x_NC @ x_NC.T + strength * torch.eye(len(x_NC), dtype=torch.float64)
        direction_C = x_NC.T @ torch.linalg.solve(gram_NN, y_N)
    else:
        gram_CC = x_NC.T @ x_NC + strength * torch.eye(x_NC.shape[1], dtype=torch.float64)
        direction_C = torch.linalg.solve(gram_CC, x_NC.T @ y_N)
    return centre_C, direction_C / scale_C


def probe_scores(points_NC: Tensor, positive_N: Tensor, judged_MC: Tensor, ridge: float = 1.0) -> Tensor:
    """What a linear probe fitted on the points says of others; larger for the positive group, float64 [M]."""
    centre_C, direction_C = ridge_direction(points_NC, positive_N, ridge)
    return (judged_MC.double() - centre_C) @ direction_C


def standardized(points_NC: Tensor, reference_MC: Tensor) -> Tensor:
    """Points in units of the reference's deviation along each dimension, from its mean, float64 [N, C]."""
    reference_MC = reference_MC.double()
    return (points_NC.double() - reference_MC.mean(0)) / reference_MC.std(0).clamp(min=1e-12)


def within(score_N: Tensor, wrong_N: Tensor, groups: Collection[Tensor]) -> float:
    """AUROC inside each group (bool [N]), weighted by its pairs; 0 where no group has both sides."""
    pairs = [float(wrong_N[group].sum() * (~wrong_N[group]).sum()) for group in groups]
    values = [auroc(score_N[group], wrong_N[group]) if count else 0.0
              for group, count in zip(groups, pairs, strict=True)]
    return sum(value * count for value, count in zip(values, pairs, strict=True)) / (sum(pairs) or 1.0)


def shuffled_within(wrong_N: Tensor, groups: Collection[Tensor], generator: torch.Generator) -> Tensor:
    """Labels permuted inside each group: the control of `within`."""
    shuffled_N = wrong_N.clone()
    for group in groups:
        members = group.nonzero()[:, 0]
        shuffled_N[members] = wrong_N[members[torch.randperm(len(members), generator=generator)]]
    return shuffled_N
