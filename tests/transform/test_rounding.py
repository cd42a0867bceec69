"""Rounding: hand-made grids, the half-step bound, degenerate groups, and what the search may not do."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from layerwise.errors import BadModel
from layerwise.nets.packed import PackedLinear
from layerwise.spec import BITS, Format
from layerwise.transform.rounding import round_to_nearest

FORMATS = [Format(bits, group, symmetric)
           for bits in BITS for group in (0, 32) for symmetric in (True, False)]


def weights(rows: int = 16, columns: int = 80, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def rounded_values(weight: Tensor, format: Format, **options: object) -> Tensor:
    return PackedLinear.from_codes(*round_to_nearest(weight, format, **options), format).dense()  # type: ignore[arg-type]


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_values_on_a_stored_grid_come_back_exactly(format: Format) -> None:
    half = 2 ** (format.bits - 1)
    codes = torch.arange(32).repeat(4, 2) % 2**format.bits  # every group reaches the grid's ends
    if format.bits > 5:
        codes[:, ::32], codes[:, 1::32] = 0, 2**format.bits - 1
    weight = (codes - half) * 0.25
    assert torch.equal(rounded_values(weight, format), weight)


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_error_is_at_most_half_a_step_and_what_bfloat16_takes(format: Format) -> None:
    weight = weights()
    codes, scale, zero = round_to_nearest(weight, format)
    assert scale.dtype == torch.bfloat16 and (zero is None) == format.symmetric
    spread = format.group or weight.shape[1]
    step = scale.float().repeat_interleave(spread, 1)[:, : weight.shape[1]]
    top = weight.abs().max()
    error = (PackedLinear.from_codes(codes, scale, zero, format).dense() - weight).abs()
    assert (error <= step / 2 + 2**-8 * top).all()


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_last_group_is_not_touched_by_padding(format: Format) -> None:
    weight = weights(columns=40)
    alone = rounded_values(weight[:, 32:], format) if format.group else rounded_values(weight, format)[:, 32:]
    assert torch.equal(rounded_values(weight, format)[:, 32:], alone)


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("search", [0, 8])
def test_constant_and_zero_groups(format: Format, search: int) -> None:
    weight = torch.tensor([0.0, 0.75, -3.0])[:, None].expand(3, 64)
    assert torch.allclose(rounded_values(weight, format, search=search), weight, rtol=2**-7)
    assert (rounded_values(weight, format, search=search)[0] == 0).all()


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_search_lowers_the_weighted_error_of_every_group(format: Format) -> None:
    weight, importance = weights(columns=96), torch.rand(96, generator=torch.Generator().manual_seed(1)) ** 4
    plain = (rounded_values(weight, format) - weight) ** 2 * importance
    searched = (rounded_values(weight, format, search=8, importance_I=importance) - weight) ** 2 * importance
    groups = (16, -1, format.group or 96)
    assert (searched.view(groups).sum(-1) <= plain.view(groups).sum(-1)).all()


@pytest.mark.parametrize(("bits", "most"), [(2, 0.70), (3, 0.90), (4, 0.93)])
def test_search_pays_at_few_bits(bits: int, most: float) -> None:
    """Squared error of normal weights in groups of 32, against the full range."""
    weight = weights(256, 256)
    plain, searched = (((rounded_values(weight, Format(bits, 32), search=search) - weight) ** 2).mean()
                       for search in (0, 8))
    assert searched < most * plain


def test_inputs_without_importance_do_not_matter() -> None:
    weight, importance = weights(columns=64), torch.ones(64)
    importance[5] = 0
    spiked = weight.clone()
    spiked[:, 5] = 100.0
    searched, plain = (rounded_values(spiked, Format(4, 32), search=search, importance_I=importance)
                       for search in (8, 0))
    others = importance > 0
    assert ((searched - spiked)[:, others] ** 2).sum() < 0.5 * ((plain - spiked)[:, others] ** 2).sum()


def test_rows_do_not_depend_on_one_another(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = weights()
    whole = rounded_values(weight, Format(4, 32), search=4)
    monkeypatch.setattr("layerwise.transform.rounding.CHUNK", 200)
    assert torch.equal(rounded_values(weight, Format(4, 32), search=4), whole)


@given(st.integers(-30, 30), st.sampled_from(FORMATS), st.integers(0, 99))
def test_scaling_by_a_power_of_two_scales_the_result(power: int, format: Format, seed: int) -> None:
    weight, factor = weights(4, 32, seed), 2.0**power
    assert torch.equal(rounded_values(weight * factor, format), rounded_values(weight, format) * factor)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(bad: float) -> None:
    weight = weights()
    weight[3, 4] = bad
    with pytest.raises(BadModel, match="1 of 1280 weights of matrix 'q' are NaN or infinite"):
        round_to_nearest(weight, Format(8), what="matrix 'q'")
