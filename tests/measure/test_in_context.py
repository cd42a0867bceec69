"""A Gaussian process against its formula, and columns that carry what is asked."""

from __future__ import annotations

import pytest
import torch

from layerwise.measure.in_context import linear, nearest, predict, selected


def rows(count: int, columns: int, seed: int) -> torch.Tensor:
    return torch.randn(count, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_it_predicts_a_smooth_function() -> None:
    known, asked = rows(80, 2, 0), rows(20, 2, 1) / 2
    found = predict(known, known[:, 0].sin() + known[:, 1], asked)
    assert found.mean_M.tolist() == pytest.approx((asked[:, 0].sin() + asked[:, 1]).tolist(), abs=0.15)


def test_it_equals_the_closed_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("layerwise.measure.in_context.SCALES", (2.0,))
    monkeypatch.setattr("layerwise.measure.in_context.NOISES", (0.1,))
    known, y, asked = rows(10, 3, 0), rows(10, 1, 1)[:, 0], rows(4, 3, 2)
    a, b = ((x - known.mean(0)) / known.std(0) for x in (known, asked))

    def kernel(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return torch.stack([torch.stack([torch.exp(-((p - q) ** 2).sum() / 3 / 8) for q in right]) for p in left])

    inside = kernel(a, a) + 0.1 * torch.eye(10)
    scaled = (y - y.mean()) / y.std()
    found = predict(known, y, asked)
    assert torch.allclose(found.mean_M, y.mean() + y.std() * kernel(b, a) @ torch.linalg.solve(inside, scaled))
    variance = 1.1 - (kernel(b, a) * torch.linalg.solve(inside, kernel(a, b)).T).sum(1)
    assert torch.allclose(found.deviation_M, y.std() * variance.sqrt())
    expected = torch.distributions.MultivariateNormal(torch.zeros(10).double(), inside).log_prob(scaled)
    assert found.likelihood == pytest.approx(float(expected))


def test_far_away_it_is_unsure_and_says_the_mean() -> None:
    known = rows(30, 2, 0)
    y = known[:, 0]
    found = predict(known, y, torch.tensor([[0.0, 0.0], [100.0, 100.0]]))
    assert float(found.mean_M[1]) == pytest.approx(float(y.mean()), abs=1e-6)
    assert found.deviation_M[1] > 3 * found.deviation_M[0]


def test_the_column_that_matters_is_chosen_and_its_double_is_not() -> None:
    x = rows(60, 4, 0)
    x = torch.cat([x, x[:, 2:3] * 2 + 1], 1)
    assert selected(x, x[:, 2], [0], 1) == [0, 2]
    assert 4 not in selected(x, x[:, 2], [], 3)


def test_units_of_columns_and_of_the_answer_do_not_matter() -> None:
    known, asked = rows(30, 2, 0), rows(5, 2, 1)
    y = known[:, 0] * known[:, 1]
    plain, scaled = predict(known, y, asked), predict(known * 100 + 3, 5 * y - 2, asked * 100 + 3)
    assert torch.allclose(5 * plain.mean_M - 2, scaled.mean_M)


def test_the_nearest_rows_are_averaged() -> None:
    known = torch.tensor([[0.0], [1.0], [10.0], [11.0]])
    assert nearest(known, torch.tensor([1.0, 3.0, 5.0, 9.0]), torch.tensor([[0.4], [20.0]]), k=2).tolist() == [2, 7]
    assert nearest(known, torch.tensor([1.0, 3.0, 5.0, 9.0]), known[:1], k=9).tolist() == [4.5]


def test_a_straight_line_is_found_by_least_squares() -> None:
    known, asked = rows(40, 3, 0), rows(5, 3, 1)
    slope = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    found = linear(known, known @ slope + 4, asked, strength=0.0)
    assert torch.allclose(found, asked @ slope + 4)
