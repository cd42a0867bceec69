"""Estimates against brute force: every rank by its own decomposition, every width by its own least squares."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from layerwise.nets.packed import PackedLinear
from layerwise.spec import Format
from layerwise.transform.gptq import factorised, gptq
from layerwise.transform.gptq import output_error as error_rows
from layerwise.transform.low_rank import factors
from layerwise.transform.narrow import refit
from layerwise.transform.output_error import (
    energy,
    low_rank_errors,
    narrow_errors,
    rounding_error,
    spread,
)
from layerwise.transform.quantize import SEARCH_STEPS, rounded_by

FORMATS = [Format(8, 0, True), Format(4, 32), Format(3, 16), Format(2, 16)]


def problem(outputs: int, inputs: int, samples: int = 300, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Weights, and correlated inputs [N, I] of different sizes, float64."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=generator, dtype=torch.float64)
    x = torch.randn(samples, inputs, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(inputs, inputs, generator=generator, dtype=torch.float64)
    return weight, x * torch.logspace(-1, 0.5, inputs, dtype=torch.float64)


def on_data(x: Tensor, weight: Tensor, other: Tensor) -> float:
    return float((x @ (weight - other.double()).T).square().sum())


def test_energy_is_the_error_of_nothing() -> None:
    weight, x = problem(10, 30)
    assert energy(weight.float(), x.T @ x) == pytest.approx(on_data(x, weight, 0 * weight), rel=1e-5)


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("method", ["nearest", "search"])
def test_rounding_is_exact(format: Format, method: str) -> None:
    weight, x = problem(12, 64)
    gram = (x.T @ x).float()
    rounded = rounded_by(method, weight.float(), format, gram if method == "search" else None)  # type: ignore[arg-type]
    dense = PackedLinear.from_codes(*rounded, format).dense(torch.float64)
    error = rounding_error(weight.float(), gram, format, method)  # type: ignore[arg-type]
    assert error == pytest.approx(on_data(x, weight, dense), rel=1e-3)


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_gptq_is_expected_within_a_third_unless_it_clips(format: Format) -> None:
    weight, x = problem(96, 128)
    weight, gram = weight.float(), (x.T @ x).float()
    real = float(error_rows(weight, gram, gptq(weight, gram, format, search=SEARCH_STEPS), format).sum())
    assert (0.5 if format.bits == 2 else 0.75) < rounding_error(weight, gram, format, "gptq") / real < 1.33
    assert rounding_error(weight, gram, format, "descent") == pytest.approx(
        0.9 * rounding_error(weight, gram, format, "gptq"), rel=0.02)
    assert rounding_error(weight, gram, format, "gptq", spread(gram)) == rounding_error(weight, gram, format, "gptq")


def test_weights_that_lie_on_the_grid_lose_nothing() -> None:
    weight, x = problem(24, 64)
    gram, format = (x.T @ x).float(), Format(4, 32)
    grid = PackedLinear.from_codes(*rounded_by("nearest", weight.float(), format), format).dense()
    assert rounding_error(grid, gram, format, "gptq") < 1e-3 * rounding_error(weight.float(), gram, format, "gptq")


def test_spread_is_what_an_error_costs() -> None:
    x = problem(1, 12)[1]
    gram = (x.T @ x).float()
    factor = factorised(gram)
    errors = torch.rand(20_000, 12, generator=torch.Generator().manual_seed(0)) - 0.5
    left = torch.linalg.solve_triangular(factor.unit_II, errors, upper=True, left=False)[:, factor.back_I]
    costs = ((left @ gram) * left).sum(1)
    assert float(spread(gram).sum() / 12) == pytest.approx(float(costs.mean()), rel=0.02)
    assert bool((spread(gram) <= 1.001 * gram.diagonal()).all())


def test_spread_of_singular_statistics() -> None:
    power = torch.tensor([3.0, 0.0, 2.0, 5.0])
    torch.testing.assert_close(spread(torch.diag(power)), power)
    assert torch.equal(spread(torch.zeros(5, 5)), torch.zeros(5))
    assert bool(spread(torch.ones(5, 5)).isfinite().all())


@settings(deadline=None, max_examples=30)
@given(outputs=st.integers(1, 24), inputs=st.integers(1, 24), samples=st.integers(1, 60), seed=st.integers(0, 500))
def test_errors_of_every_rank(outputs: int, inputs: int, samples: int, seed: int) -> None:
    weight, x = problem(outputs, inputs, samples, seed)
    errors = low_rank_errors(weight, x.T @ x)
    singular = torch.linalg.svdvals(x @ weight.T)
    total = float(singular.square().sum())
    assert len(errors) == min(outputs, inputs) + 1
    for rank, error in enumerate(errors.tolist()):
        assert error == pytest.approx(float(singular[rank:].square().sum()), rel=1e-3, abs=1e-5 * total)
    assert bool((errors.diff() <= 0).all())


@pytest.mark.parametrize(("outputs", "inputs"), [(20, 40), (40, 20)])
def test_the_factors_have_the_errors_foretold(outputs: int, inputs: int) -> None:
    weight, x = problem(outputs, inputs)
    errors = low_rank_errors(weight.float(), (x.T @ x).float())
    for rank in (1, 5, 13):
        b, a = factors(weight, rank, x.T @ x)
        assert on_data(x, weight, b @ a) == pytest.approx(float(errors[rank]), rel=1e-3)
    b, a = factors(weight, 5, None, "plain")
    assert float((weight - b @ a).square().sum()) == pytest.approx(float(low_rank_errors(weight)[5]), rel=1e-4)


@settings(deadline=None, max_examples=25)
@given(unit=st.sampled_from([1, 2, 4]), samples=st.integers(2, 80), seed=st.integers(0, 500))
def test_errors_of_every_width(unit: int, samples: int, seed: int) -> None:
    weight, x = problem(10, 16, samples, seed)
    errors, order = narrow_errors(weight, x.T @ x, unit)
    assert sorted(order.tolist()) == list(range(16 // unit))
    total = on_data(x, weight, 0 * weight)
    assert float(errors[0]) == pytest.approx(total, rel=0.05)
    assert float(errors[-1]) == 0
    for count in range(1, 16 // unit):
        kept = (order[:count, None] * unit + torch.arange(unit)).flatten()
        narrow = torch.zeros_like(weight).index_copy(1, kept, weight @ refit(x.T @ x, kept))
        best = torch.linalg.lstsq(x[:, kept], x @ weight.T, driver="gelsd").solution.T
        least = on_data(x, weight, torch.zeros_like(weight).index_copy(1, kept, best))
        real = on_data(x, weight, narrow)
        assert least - 1e-9 * total <= real <= float(errors[count]) * 1.001 + 1e-9 * total
        assert float(errors[count]) <= least + 0.02 * total
