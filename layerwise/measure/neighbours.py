"""The shape of a cloud of hidden states: distances to near neighbours, and how many dimensions it fills.

Sources: the two-neighbour dimension is that of Facco et al. 2017 (doi 10.1038/s41598-017-11873-y), the
participation ratio is (sum of variances)^2 / sum of squared variances along the principal axes. All sums are
in float64, so that clouds far from the origin keep their small distances.

Shapes: N points, M points of a reference, C dimensions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from layerwise.errors import BadData, BadOption

CHUNK = 512
"""Points whose distances are held at once."""


def nearest(points_NC: Tensor, reference_MC: Tensor, k: int, *, inside: bool = False) -> Tensor:
    """Distances to the k nearest points of the reference, ascending, float64 [N, k].

    With `inside` the points are the reference itself, and a point is no neighbour of its own.
    Raises BadOption where the reference has too few points.
    """
    available = len(reference_MC) - inside
    if not 1 <= k <= available:
        raise BadOption(f"{k} nearest of {available} points", expected=f"1 to {available} neighbours",
                        do="give a larger reference, or a smaller k")
    centre_C = reference_MC.double().mean(0)
    reference_MC = reference_MC.double() - centre_C
    found = []
    for start in range(0, len(points_NC), CHUNK):
        part_NC = points_NC[start : start + CHUNK].double() - centre_C
        distance_NM = torch.cdist(part_NC, reference_MC)
        if inside:
            rows = torch.arange(len(part_NC))
            distance_NM[rows, rows + start] = math.inf
        found.append(distance_NM.topk(k, largest=False).values)
    return torch.cat(found)


def deviation(points_NC: Tensor, reference_MC: Tensor, k: int = 5, *, inside: bool = False) -> Tensor:
    """Mean distance to the k nearest points of the reference, float64 [N]."""
    return nearest(points_NC, reference_MC, k, inside=inside).mean(1)


def mahalanobis(points_NC: Tensor, reference_MC: Tensor, shrinkage: float = 0.1) -> Tensor:
    """Distance to the mean of the reference in units of its spread along each direction, float64 [N].

    The covariance is drawn towards its mean variance by `shrinkage`, as there may be fewer points than dimensions.
    """
    if len(reference_MC) < 2:
        raise BadData(f"a reference of {len(reference_MC)} points", expected="at least two", do="give more")
    centre_C = reference_MC.double().mean(0)
    covariance_CC = torch.cov(reference_MC.double().T - centre_C[:, None])
    level = covariance_CC.diagonal().mean().clamp(min=1e-30)
    unit_CC = torch.eye(len(covariance_CC), dtype=torch.float64, device=covariance_CC.device)
    root_CC = torch.linalg.cholesky((1 - shrinkage) * covariance_CC + shrinkage * level * unit_CC)
    away_CN = torch.linalg.solve_triangular(root_CC, (points_NC.double() - centre_C).T, upper=False)
    distance_N: Tensor = away_CN.norm(dim=0)
    return distance_N


def two_nn(points_NC: Tensor, discard: float = 0.1) -> float:
    """Intrinsic dimension from the ratio of each point's second to its first neighbour's distance.

    The slope through the origin of -log(1 - F) over log(ratio), where F is the rank of the ratio divided by the
    number of points; the largest `discard` of the ratios are left out. Points with an exact double do not
    count. nan where fewer than three points remain.
    """
    points_NC = torch.unique(points_NC.double(), dim=0)
    if len(points_NC) < 3:
        return math.nan
    first_N, second_N = nearest(points_NC, points_NC, 2, inside=True).unbind(1)
    ratio_N = (second_N / first_N).log().sort().values
    rank_N = torch.arange(1, len(ratio_N) + 1, dtype=torch.float64) / len(ratio_N)
    kept = min(len(ratio_N) - 1, max(1, round((1 - discard) * len(ratio_N))))
    x_N, y_N = ratio_N[:kept].cpu(), -torch.log1p(-rank_N[:kept])
    return float((x_N * y_N).sum() / (x_N * x_N).sum()) if bool(x_N.any()) else math.nan


def participation_ratio(points_NC: Tensor) -> float:
    """How many principal axes share the variance: 1 on a line, C for a ball; nan for equal points."""
    if len(points_NC) < 2:
        raise BadData(f"{len(points_NC)} points", expected="at least two", do="look at more tokens")
    x_NC = points_NC.double() - points_NC.double().mean(0)
    gram = x_NC @ x_NC.T if len(x_NC) < x_NC.shape[1] else x_NC.T @ x_NC
    total, squares = float(gram.trace()), float(gram.square().sum())
    return total**2 / squares if squares else math.nan
