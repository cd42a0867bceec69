"""Entropy of spectra known by hand, and profiles over depth."""

from __future__ import annotations

import math

import pytest
import torch

from layerwise.measure.spectral_entropy import depth_profile, spectral_entropy


def test_tokens_on_a_line_have_none() -> None:
    line = torch.linspace(-1, 1, 6)[:, None] * torch.randn(1, 5, generator=torch.Generator().manual_seed(0))
    assert float(spectral_entropy(line[None])) == pytest.approx(0, abs=1e-6)
    assert float(spectral_entropy(torch.ones(1, 4, 3))) == 0


def test_tokens_in_all_directions_have_all() -> None:
    both = torch.cat([torch.eye(3), -torch.eye(3)])
    assert float(spectral_entropy(both[None])) == pytest.approx(1)


@pytest.mark.parametrize("shape", [(7, 4), (4, 7)])
def test_it_equals_a_loop(shape: tuple[int, int]) -> None:
    z = torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows = z - z.mean(0)
    rows = rows / rows.norm(dim=1, keepdim=True)
    values = torch.linalg.svdvals(rows).square()
    p = (values / values.sum()).tolist()
    expected = -sum(q * math.log(q) for q in p if q > 1e-12) / math.log(min(shape))
    assert float(spectral_entropy(z[None])) == pytest.approx(expected, abs=1e-9)


def test_shift_scale_and_order_of_tokens_do_not_matter() -> None:
    z = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.allclose(spectral_entropy(z), spectral_entropy(4 * z.flip(1) + 3), atol=1e-9)


def test_profiles_of_any_depth_share_columns() -> None:
    layers = [torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(k)) for k in range(3)]
    profile = depth_profile(layers, 5)
    ends = [spectral_entropy(layer) for layer in layers]
    assert profile.shape == (2, 5)
    assert torch.allclose(profile[:, [0, 2, 4]], torch.stack(ends, 1))
    assert torch.allclose(profile[:, 1], (ends[0] + ends[1]) / 2)
    assert torch.allclose(depth_profile(layers[:1], 4), ends[0][:, None].expand(-1, 4))
