"""Clouds whose dimension and distances are known, and a float64 loop."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from layerwise.errors import BadData, BadOption
from layerwise.measure.neighbours import deviation, mahalanobis, nearest, participation_ratio, two_nn


def cloud(points: int, flat: int, width: int, seed: int = 0) -> Tensor:
    """A ball of `flat` dimensions, turned into `width`."""
    generator = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64)).Q[:flat]
    return torch.randn(points, flat, generator=generator, dtype=torch.float64) @ turn + 100


def test_distances_on_a_line() -> None:
    reference = torch.tensor([[0.0], [1.0], [3.0]])
    assert nearest(torch.tensor([[2.0]]), reference, 3).tolist() == [[1, 1, 2]]
    assert nearest(reference, reference, 2, inside=True).tolist() == [[1, 3], [1, 2], [2, 3]]
    assert deviation(torch.tensor([[2.0]]), reference, 3).tolist() == pytest.approx([4 / 3])


def test_a_point_far_from_the_origin_keeps_its_small_distances() -> None:
    points = torch.tensor([[1e6, 0.0], [1e6, 0.25], [1e6, 1.0]])
    assert nearest(points, points, 1, inside=True)[:, 0].tolist() == [0.25, 0.25, 0.75]


def test_distances_equal_a_float64_loop() -> None:
    points, reference = cloud(30, 5, 9), cloud(700, 5, 9, seed=1)
    expected = [sorted(math.dist(p, r) for r in reference.tolist())[:4] for p in points.tolist()]
    assert torch.allclose(nearest(points.float(), reference.float(), 4), torch.tensor(expected).double(), atol=1e-4)


def test_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    points = cloud(50, 4, 6)
    whole = nearest(points, points, 3, inside=True)
    monkeypatch.setattr("layerwise.measure.neighbours.CHUNK", 7)
    assert torch.allclose(nearest(points, points, 3, inside=True), whole, atol=1e-9)


@pytest.mark.parametrize("flat", [1, 2, 5])
def test_the_dimension_is_that_of_the_ball_and_not_of_the_space(flat: int) -> None:
    assert two_nn(cloud(2000, flat, 20)) == pytest.approx(flat, rel=0.15)


def test_the_dimension_equals_the_slope_of_a_loop() -> None:
    points = cloud(60, 3, 5)
    ratios = []
    for here in points.tolist():
        near = sorted(math.dist(here, there) for there in points.tolist())
        ratios.append(math.log(near[2] / near[1]))
    pairs = [(x, -math.log(1 - rank / 60)) for rank, x in enumerate(sorted(ratios)[:54], start=1)]
    assert two_nn(points) == pytest.approx(sum(x * y for x, y in pairs) / sum(x * x for x, _ in pairs))


def test_the_unit_of_length_and_doubles_do_not_matter() -> None:
    points = cloud(300, 3, 8)
    assert two_nn(points * 1e-3) == pytest.approx(two_nn(points))
    assert two_nn(torch.cat([points, points[:50]])) == pytest.approx(two_nn(points))


def test_equal_points_have_no_dimension() -> None:
    assert math.isnan(two_nn(torch.ones(10, 3)))
    assert math.isnan(participation_ratio(torch.ones(10, 3)))


def test_the_participation_ratio_counts_equal_axes() -> None:
    corners = torch.tensor([[a, b, c] for a in (-1.0, 1) for b in (-1.0, 1) for c in (-1.0, 1)])
    assert participation_ratio(corners + 7) == pytest.approx(3)
    assert participation_ratio(corners * torch.tensor([1.0, 0, 0])) == pytest.approx(1)
    variances = torch.tensor([1.0, 4, 9])
    expected = float(variances.sum() ** 2 / variances.square().sum())
    assert participation_ratio(corners * variances.sqrt()) == pytest.approx(expected)


def test_the_participation_ratio_is_the_same_over_points_and_dimensions() -> None:
    points = torch.randn(6, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    eigenvalues = torch.linalg.eigvalsh(torch.cov(points.T))
    assert participation_ratio(points) == pytest.approx(float(eigenvalues.sum() ** 2 / eigenvalues.square().sum()))


def test_too_few_points_are_refused() -> None:
    with pytest.raises(BadOption, match="1 to 2 neighbours"):
        nearest(torch.ones(3, 2), torch.ones(3, 2), 3, inside=True)
    with pytest.raises(BadData, match="at least two"):
        participation_ratio(torch.ones(1, 2))


def test_mahalanobis_counts_in_the_spread_of_each_direction() -> None:
    spread = torch.tensor([[2.0, 0.0], [-2.0, 0.0], [0.0, 1.0], [0.0, -1.0]]) + 7
    found = mahalanobis(torch.tensor([[9.0, 7.0], [7.0, 8.0]]), spread, shrinkage=0.0)
    assert found.tolist() == pytest.approx([(4 / (8 / 3)) ** 0.5, (1 / (2 / 3)) ** 0.5])
    few = cloud(5, 3, 40)
    assert bool(mahalanobis(few, few).isfinite().all())
    with pytest.raises(BadData, match="1 points"):
        mahalanobis(few, few[:1])


def test_mahalanobis_with_full_shrinkage_is_plain_distance() -> None:
    reference, points = cloud(50, 3, 6), cloud(9, 3, 6, seed=1)
    plain = (points - reference.mean(0)).norm(dim=-1)
    scaled = mahalanobis(points, reference, shrinkage=1.0)
    assert torch.allclose(scaled / scaled[0], plain / plain[0])
