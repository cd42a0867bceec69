"""The system from end to end on its small model, and its choice of layers on numbers known by hand."""

from __future__ import annotations

import pytest
import torch

from layerwise.systems.measure.localization_editing import _choice, _unrelated
from layerwise.testing import check_system

LAYERS = [0, 4, 8]


@pytest.mark.slow
def test_it_runs() -> None:
    checks = {check.name: check for check in check_system("localization-editing")}
    assert len(checks) == 4
    for method in ("ROME", "fine-tuning"):
        r2 = checks[f"{method}: tracing does not say where to edit"].measured["R2"]
        assert r2["both"] >= r2["layer"] > 0.3


def test_a_score_that_follows_the_layer_alone_is_unrelated() -> None:
    draw = torch.Generator().manual_seed(0)
    share_NL = torch.rand(200, 3, generator=draw)
    score_NLS = torch.tensor([0.9, 0.5, 0.1])[:, None] + 0.05 * torch.randn(200, 3, 3, generator=draw)
    assert _unrelated("ROME", LAYERS, share_NL, score_NLS, "full", 0).holds is True


def test_a_score_that_follows_the_share_is_related() -> None:
    share_NL = torch.rand(200, 3, generator=torch.Generator().manual_seed(0))
    check = _unrelated("ROME", LAYERS, share_NL, share_NL[..., None].repeat(1, 1, 3), "full", 0)
    assert check.holds is False and check.measured["correlation within layers"] == 1.0


def test_a_fixed_layer_is_chosen_on_other_facts_than_it_is_judged_on() -> None:
    rewrite_NL = torch.tensor([[0.9, 0.1, 0.1], [0.2, 0.8, 0.1]] * 4)
    share_NL = torch.tensor([[0.0, 1.0, 0.0]] * 8)
    check = _choice(LAYERS, share_NL, rewrite_NL)
    assert check.measured == {"fixed layer": 0, "rewrite there": 0.2, "rewrite at traced layers": 0.8}
    assert check.holds is False
