"""Moments equal those of all rows at once, whatever the batches; convolutions see patches."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from layerwise.errors import BadData, BadOption
from layerwise.transform.moments import PANEL, Moments, mirrored, moments, rows, watching, with_outer


def of(*batches: torch.Tensor) -> Moments:
    found = Moments.empty(batches[0].shape[1])
    for batch in batches:
        found.add(batch)
    return found


def test_they_equal_the_float64_formula() -> None:
    x = torch.randn(50, 6) + 3
    seen = of(x)
    assert torch.allclose(seen.mean_I, x.double().mean(0))
    assert torch.allclose(seen.covariance_II, torch.cov(x.double().T, correction=0), atol=1e-5)
    assert torch.allclose(seen.second_II, x.double().T @ x.double() / 50, rtol=1e-6)


def test_batching_order_and_merging_do_not_matter() -> None:
    x = torch.randn(40, 5).double()
    whole, parts, merged = of(x), of(x[30:], x[:30]), of(x[:7]) + of(x[7:])
    for other in (parts, merged):
        assert other.count == 40 and torch.allclose(whole.outer_II, other.outer_II, rtol=1e-12)
        assert torch.allclose(whole.sum_I, other.sum_I, rtol=1e-12)


@given(st.sampled_from([1, 5, PANEL - 1, PANEL, PANEL + 1, 2 * PANEL + 7]), st.integers(1, 9))
def test_half_of_the_outer_products_give_all(width: int, tokens: int) -> None:
    x, y = torch.randn(2, tokens, width, dtype=torch.float64)
    found = mirrored(with_outer(with_outer(None, x), y))
    assert torch.allclose(found, x.T @ x + y.T @ y, atol=1e-12) and torch.equal(found, found.T)


def test_bfloat16_rows_are_summed_in_float32() -> None:
    x = torch.full((4096, 1), 1.0, dtype=torch.bfloat16)
    assert float(of(x).outer_II) == 4096


def test_nothing_has_no_mean() -> None:
    with pytest.raises(BadData, match="moments of nothing"):
        _ = Moments.empty(3).mean_I


def test_a_convolution_is_a_linear_map_of_its_rows() -> None:
    conv = nn.Conv2d(2, 3, 3, stride=2, padding=1, bias=False)
    x = torch.randn(2, 2, 7, 7)
    y_NO = rows(conv, x) @ conv.weight.flatten(1).T
    assert torch.allclose(y_NO, conv(x).flatten(2).transpose(1, 2).flatten(0, 1), atol=1e-5)


def test_groups_are_refused() -> None:
    with pytest.raises(BadOption, match="grouped"):
        rows(nn.Conv2d(4, 4, 3, groups=2), torch.zeros(1, 4, 5, 5))


def test_every_layer_is_seen_and_hooks_are_gone() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    x = torch.randn(10, 3)
    found = moments({"a": net[0], "b": net[2]}, lambda: [net(part) for part in x.split(4)])
    assert torch.allclose(found["a"].mean_I, x.double().mean(0), atol=1e-6)
    assert torch.allclose(found["b"].mean_I, net[:2](x).double().mean(0).detach(), atol=1e-6)
    assert not net[0]._forward_pre_hooks


def test_hooks_are_gone_after_an_error() -> None:
    layer = nn.Linear(3, 4)
    with pytest.raises(ZeroDivisionError), watching({"a": layer}, lambda *_: None):
        _ = 1 / 0
    assert not layer._forward_pre_hooks
