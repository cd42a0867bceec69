"""What data does not reach is found and left out; the reference is the best of its rank."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from layerwise.transform.moments import Moments
from layerwise.transform.subspace import (
    Directions,
    Subspaces,
    best,
    energy_rank,
    factors,
    numerical_rank,
    output_error,
    plain,
    project,
    two_factors,
)


def used(weight_OI: Tensor, seen: Moments, eps: float) -> Subspaces:
    return Directions(weight_OI, seen).used(eps)


def leading(weight_OI: Tensor, seen: Moments, rank: int) -> Subspaces:
    return Directions(weight_OI, seen).leading(rank)


def data(directions: int, width: int = 8, count: int = 500, mean: float = 0.0) -> tuple[Tensor, Moments]:
    """Rows that vary in the first `directions` coordinates, about `mean` in the last one."""
    torch.manual_seed(0)
    x_NI = torch.zeros(count, width, dtype=torch.float64)
    x_NI[:, :directions] = torch.randn(count, directions, dtype=torch.float64)
    x_NI[:, -1] = mean
    seen = Moments.empty(width)
    seen.add(x_NI)
    return x_NI, seen


def test_energy_rank_by_hand() -> None:
    energy = torch.tensor([1.0, 6.0, 3.0])
    assert [energy_rank(energy, eps) for eps in (0.5, 0.4, 0.1, 0.05, 0.0)] == [1, 1, 2, 3, 3]


def test_the_used_rank_is_that_of_the_data_and_of_the_weight() -> None:
    _, seen = data(3)
    weight = torch.randn(6, 8, dtype=torch.float64)
    assert numerical_rank(weight) == 6 and used(weight, seen, 1e-6).rank == 3
    thin = torch.randn(6, 2, dtype=torch.float64) @ torch.randn(2, 8, dtype=torch.float64)
    assert numerical_rank(thin) == 2 and used(thin, seen, 1e-6).rank == 2


def test_data_that_fills_all_directions_uses_them() -> None:
    _, seen = data(8, mean=0.0)
    x = torch.randn(4000, 8, dtype=torch.float64)
    seen = Moments.empty(8)
    seen.add(x)
    weight = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))[0]
    assert used(weight, seen, 1e-2).rank == 8
    assert torch.allclose(project(weight, used(weight, seen, 0.0)), weight)


def test_outputs_on_the_data_are_kept_with_their_mean() -> None:
    x, seen = data(3, mean=5.0)
    weight = torch.randn(6, 8, dtype=torch.float64)
    spaces = used(weight, seen, 1e-9)
    assert spaces.rank == 4
    assert torch.allclose(x @ project(weight, spaces).T, x @ weight.T, atol=1e-9)
    assert output_error(weight, project(weight, spaces), seen) < 1e-9


def test_factors_multiply_to_the_projection() -> None:
    _, seen = data(5)
    for shape in ((6, 8), (3, 8)):
        weight = torch.randn(shape, dtype=torch.float64)
        spaces = used(weight, seen, 0.1)
        wide, narrow = factors(weight, spaces)
        expected = spaces.outputs_OT @ spaces.outputs_OT.T @ weight @ spaces.inputs_IS @ spaces.inputs_IS.T
        assert wide.shape[1] == narrow.shape[0] == spaces.rank
        assert torch.allclose(wide @ narrow, expected)


def test_leading_has_the_rank_asked_for() -> None:
    _, seen = data(7, mean=2.0)
    assert [leading(torch.randn(6, 8), seen, rank).rank for rank in (1, 3, 6)] == [1, 3, 6]


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_the_reference_is_not_beaten(rank: int) -> None:
    torch.manual_seed(1)
    x = torch.randn(300, 8, dtype=torch.float64) @ torch.randn(8, 8, dtype=torch.float64) + 1
    seen = Moments.empty(8)
    seen.add(x)
    weight = torch.randn(6, 8, dtype=torch.float64)
    cut = product(best(weight, seen), rank)
    error = output_error(weight, cut, seen)
    real = (x @ (weight - cut).T).norm() / (x @ weight.T).norm()
    assert error == pytest.approx(float(real), rel=1e-6)
    optimum = torch.linalg.svdvals(x @ weight.T)
    assert error == pytest.approx(float(optimum[rank:].norm() / optimum.norm()), rel=1e-6)
    for other in (product(plain(weight), rank), project(weight, leading(weight, seen, rank))):
        assert error <= output_error(weight, other, seen)


def product(pair: tuple[Tensor, Tensor], rank: int) -> Tensor:
    return pair[0][:, :rank] @ pair[1][:rank]


def test_two_factors_of_full_rank_compute_the_same() -> None:
    layer, x = nn.Linear(5, 4), torch.randn(3, 5)
    assert torch.allclose(two_factors(layer, *plain(layer.weight))(x), layer(x), atol=1e-6)


def test_the_weight_keeps_its_dtype() -> None:
    _, seen = data(3)
    assert project(torch.randn(4, 8), used(torch.randn(4, 8), seen, 0.1)).dtype == torch.float32
