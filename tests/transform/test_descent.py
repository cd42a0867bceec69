"""Coordinate descent: each step against a float64 search over all codes, and that no step raises the error."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from layerwise.nets.packed import PackedLinear
from layerwise.spec import Format
from layerwise.transform.descent import descend
from layerwise.transform.gptq import factorised, gptq, output_error
from layerwise.transform.rounding import Grid, code_values, find_grid, nearest_codes, stored

FORMATS = [Format(bits, group, symmetric) for bits in (2, 3, 4) for group in (0, 16, 48) for symmetric in (True, False)]
FORMATS += [Format(3, 16, symmetric, scale_bits) for symmetric in (True, False) for scale_bits in (4, 6)]


def problem(outputs: int = 12, inputs: int = 72, samples: int = 150, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, inputs, generator=generator) @ torch.randn(inputs, inputs, generator=generator)
    x = x * torch.logspace(-1, 1, inputs)
    return torch.randn(outputs, inputs, generator=generator), x.T @ x


def error_of(w_IO: Tensor, codes_IO: Tensor, grid: Grid, hessian_II: Tensor, format: Format) -> Tensor:
    """Each output's e' H e in float64."""
    error = (w_IO - code_values(codes_IO, grid, format)).double()
    return ((hessian_II.double() @ error) * error).sum(0)


@settings(deadline=None, max_examples=30)
@given(format=st.sampled_from(FORMATS), seed=st.integers(0, 500), samples=st.integers(1, 200),
       sweeps=st.integers(1, 3))
def test_no_output_ends_with_more_error(format: Format, seed: int, samples: int, sweeps: int) -> None:
    weight, gram = problem(samples=samples, seed=seed)
    w, hessian = weight.T.contiguous(), factorised(gram).hessian_II
    grid = find_grid(w, format, 0, None)
    start = nearest_codes(w, grid, format)
    codes, better = descend(w, start, grid, hessian, format, sweeps)
    before, after = (error_of(w, c, g, hessian, format) for c, g in ((start, grid), (codes, better)))
    assert (after <= before * (1 + 1e-5)).all()
    assert torch.equal(codes, codes.round()) and codes.min() >= 0 and codes.max() < 2**format.bits
    packed = PackedLinear.from_codes(*stored(codes, better), format).dense()
    assert torch.equal(packed, code_values(codes, better, format).T), "scales can be stored as they are"
    assert (better.scale > 0).all() and torch.equal(better.scale, better.scale.bfloat16().float())


@pytest.mark.parametrize("format", [Format(3, 16), Format(2, 16, True)], ids=str)
def test_where_it_stops_no_single_code_could_be_better(format: Format) -> None:
    weight, gram = problem(6, 32)
    w, hessian = weight.T.contiguous(), factorised(gram).hessian_II
    grid = find_grid(w, format, 4, gram.diagonal())
    codes, grid = descend(w, nearest_codes(w, grid, format), grid, hessian, format, 60)
    least = error_of(w, codes, grid, hessian, format)
    for column in range(32):
        for code in range(2**format.bits):
            other = codes.clone()
            other[column] = code
            assert (error_of(w, other, grid, hessian, format) >= least * (1 - 1e-5)).all()


def test_scale_and_zero_are_those_of_least_squares() -> None:
    """Codes that are already right, scale and zero that are not: one sweep brings back what made the weights."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(16, (16, 5), generator=generator).float()
    codes[0], codes[1] = 0, 15
    made = Grid(torch.full((1, 5), 0.5), torch.full((1, 5), 1.25))
    w = code_values(codes, made, Format(4, 16))
    off = Grid(torch.full((1, 5), 0.5078125), torch.full((1, 5), 1.2265625))
    new, grid = descend(w, codes, off, torch.eye(16) * 3, Format(4, 16), 1)
    assert torch.equal(new, codes) and torch.equal(grid.scale, made.scale)
    assert grid.zero is not None and made.zero is not None and torch.equal(grid.zero, made.zero)


def test_outputs_do_not_depend_on_one_another() -> None:
    weight, gram = problem()
    w, hessian, format = weight.T.contiguous(), factorised(gram).hessian_II, Format(3, 16)
    grid = find_grid(w, format, 0, None)
    whole = descend(w, nearest_codes(w, grid, format), grid, hessian, format)[0]
    half = Grid(grid.scale[:, :6], None if grid.zero is None else grid.zero[:, :6])
    part = descend(w[:, :6], nearest_codes(w[:, :6], half, format), half, hessian, format)[0]
    assert (part == whole[:, :6]).float().mean() > 0.98


@pytest.mark.parametrize(("bits", "most"), [(2, 0.8), (3, 0.9), (4, 0.9)])
def test_descent_after_gptq_pays(bits: int, most: float) -> None:
    weight, gram = problem(64, 96, 400)
    format = Format(bits, 32)
    plain, polished = (output_error(weight, gram, gptq(weight, gram, format, search=8, sweeps=sweeps), format).sum()
                       for sweeps in (0, 2))
    assert polished < most * plain
