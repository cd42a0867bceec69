"""Every kind draws what it says, windows are scaled by their past alone, and statistics tell kinds apart."""

from __future__ import annotations

import math

import pytest
import torch

from layerwise.data.series import FEATURES, HELD_OUT, KINDS, TRAINING, features, series, windows
from layerwise.errors import UnknownName


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_finite_moves_and_repeats(kind: str) -> None:
    drawn = series(kind, 20, 96, 3)
    assert drawn.shape == (20, 96)
    assert bool(torch.isfinite(drawn).all())
    assert float(drawn.std(1).min()) > 0
    assert torch.equal(drawn, series(kind, 20, 96, 3))
    assert not torch.equal(drawn, series(kind, 20, 96, 4))


def test_kinds_for_training_are_not_held_out() -> None:
    assert not set(TRAINING) & set(HELD_OUT)
    assert len(TRAINING) + len(HELD_OUT) == len(KINDS)
    with pytest.raises(UnknownName, match="seasonal"):
        series("season", 1, 8, 0)


def test_windows_are_scaled_by_what_came_before() -> None:
    past, ahead = windows(torch.arange(12.0)[None], 8, 4)
    assert past.mean() == pytest.approx(0, abs=1e-6)
    assert past.std(1).item() == pytest.approx(1)
    assert ahead[0].diff().tolist() == pytest.approx(past[0].diff()[:3].tolist())
    changed = torch.arange(12.0)[None].clone()
    changed[:, 8:] += 100
    assert torch.equal(windows(changed, 8, 4)[0], past)


def test_statistics_by_hand() -> None:
    found = dict(zip(FEATURES, features(torch.sin(2 * math.pi * torch.arange(64) / 8)[None])[0].tolist(), strict=True))
    assert found["largest peak"] == pytest.approx(1, abs=1e-6)
    assert found["peak frequency"] == pytest.approx(7 / 32)
    assert found["lag 8"] == pytest.approx(1, abs=0.02)
    assert found["lag 4"] == pytest.approx(-1, abs=0.02)
    assert found["spectral entropy"] == pytest.approx(0, abs=1e-5)
    line = dict(zip(FEATURES, features(torch.arange(64.0)[None])[0].tolist(), strict=True))
    assert line["trend share"] == pytest.approx(1, abs=0.01)
    assert line["turning points"] == 0


def test_statistics_do_not_see_level_and_unit() -> None:
    drawn = series("seasonal", 5, 64, 0)
    assert torch.allclose(features(drawn), features(3 * drawn + 7), atol=1e-4)
    assert bool(torch.isfinite(features(torch.ones(2, 64))).all())
