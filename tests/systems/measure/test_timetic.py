"""Verdicts on tables made up to order, and the system end to end."""

from __future__ import annotations

import pytest
import torch

from layerwise.data.series import FEATURES
from layerwise.systems.measure.timetic import GROUPS, POINTS, Known, judged, rank
from layerwise.testing import check_system


@pytest.fixture(autouse=True)
def _few_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("layerwise.systems.measure.timetic.CHOSEN", 1)


def planted(told: bool) -> Known:
    """Eight models on eight data sets; scores follow the profile where `told`, zero-shot errors are noise."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(8, GROUPS, len(FEATURES), generator=generator)
    profile = torch.rand(8, 8, GROUPS, POINTS, generator=generator)
    score = profile[..., 0, 0] if told else torch.rand(8, 8, generator=generator)
    profile[:] = profile[:, :, :1]
    return Known(features, profile, torch.rand(8, 8, 1, generator=generator), score[..., None].exp(), torch.rand(8))


def test_what_the_profile_tells_is_found() -> None:
    ranked, better, _ = judged(planted(True), "full", 0)
    assert ranked.holds is True
    assert better.holds is True
    assert ranked.measured["TimeTic"] > 0.7


def test_without_a_relation_nothing_is_found() -> None:
    ranked, better, _ = judged(planted(False), "full", 0)
    assert ranked.holds is False
    assert better.holds is False


def test_scores_that_are_all_alike_rank_nothing() -> None:
    assert rank(torch.ones(4), torch.arange(4.0)) == 0
    assert rank(torch.arange(4.0), torch.arange(4.0)) == 1


def test_it_runs() -> None:
    assert len(check_system("timetic")) == 3
