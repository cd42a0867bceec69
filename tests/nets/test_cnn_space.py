"""Plans build the networks they describe, and draws stay in the space."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from layerwise.measure.traffic import Traffic
from layerwise.nets.cnn_space import KINDS, Block, CnnPlan, Kind, Stage, sampled


@pytest.mark.parametrize("kind", [*KINDS, "expanded"])
def test_every_kind_gives_logits(kind: Kind) -> None:
    net = CnnPlan(32, (Stage(kind, 2, 8), Stage(kind, 1, 12, 5)), classes=7).build()
    assert net(torch.randn(2, 3, 32, 32)).shape == (2, 7)
    assert len(net) == 1 + 3 + 1
    assert not net.training


def test_depthwise_saves_the_operations_of_mixing() -> None:
    counts = {}
    for kind in ("depthwise", "expanded"):
        block = Block(kind, 8, 8, 3, 1)  # type: ignore[arg-type]
        with torch.inference_mode(), Traffic() as traffic:
            block(torch.randn(1, 8, 4, 4))
        counts[kind] = traffic.operations
    wide, pixels = 32, 16
    assert counts["expanded"] - counts["depthwise"] == 2 * pixels * 9 * (wide * wide - wide)


def test_a_shortcut_needs_equal_shapes() -> None:
    assert Block("residual", 8, 8, 3, 1).shortcut
    assert not Block("residual", 8, 8, 3, 2).shortcut
    assert not Block("plain", 8, 8, 3, 1).shortcut


def test_draws_repeat_and_build() -> None:
    assert sampled(5, 0) == sampled(5, 0) != sampled(5, 1)
    for plan in sampled(4, 0):
        assert isinstance(plan.build(), nn.Sequential)
