"""AUROC against counting pairs, and a probe on groups that a plane divides."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from layerwise.measure.separation import (
    auroc,
    probe_scores,
    ridge_direction,
    shuffled_within,
    standardized,
    within,
)


def test_auroc_by_hand() -> None:
    positive = torch.tensor([True, True, False, False])
    assert auroc(torch.tensor([4.0, 3, 2, 1]), positive) == 1
    assert auroc(torch.tensor([1.0, 2, 3, 4]), positive) == 0
    assert auroc(torch.ones(4), positive) == 0.5
    assert math.isnan(auroc(torch.ones(4), torch.ones(4)))


def test_auroc_equals_counting_pairs() -> None:
    generator = torch.Generator().manual_seed(0)
    scores, positive = torch.randint(9, (60,), generator=generator), torch.rand(60, generator=generator) < 0.3
    pairs = [(a > b) + (a == b) / 2 for a in scores[positive].tolist() for b in scores[~positive].tolist()]
    assert auroc(scores, positive) == pytest.approx(sum(pairs) / len(pairs))


@pytest.mark.parametrize("count", [30, 400])
def test_the_probe_separates_what_a_plane_divides(count: int) -> None:
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(2 * count, 60, generator=generator)
    positive = points[:, 0] > 0
    scores = probe_scores(points[:count], positive[:count], points[count:])
    assert auroc(scores, positive[count:]) > (0.7 if count == 30 else 0.95)


def test_both_ways_to_solve_agree() -> None:
    points = torch.randn(20, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    positive = points[:, 1] > 0
    wide = torch.cat([points, torch.zeros(20, 1, dtype=torch.float64)], 1)
    assert torch.allclose(ridge_direction(wide, positive)[1][:-1], ridge_direction(points, positive)[1], atol=1e-9)


def test_standardized_points_of_the_reference_have_unit_deviation() -> None:
    points = torch.randn(50, 3, generator=torch.Generator().manual_seed(0)) * 5 + 2
    found = standardized(points, points)
    assert found.mean(0).tolist() == pytest.approx([0, 0, 0], abs=1e-9)
    assert found.std(0).tolist() == pytest.approx([1, 1, 1])


def test_equal_difficulty_removes_what_difficulty_explains() -> None:
    level = torch.tensor([True] * 50 + [False] * 50)
    wrong = torch.cat([torch.arange(50) % 5 > 0, torch.arange(50) % 5 == 0])
    score = level.double()
    groups: list[Tensor] = [level, ~level]
    assert within(score, wrong, groups) == 0.5


def test_labels_stay_in_their_group() -> None:
    level = torch.arange(40) < 20
    wrong = torch.arange(40) % 20 < 5
    shuffled = shuffled_within(wrong, [level, ~level], torch.Generator().manual_seed(0))
    assert int(shuffled[level].sum()) == int(shuffled[~level].sum()) == 5 and not torch.equal(shuffled, wrong)
