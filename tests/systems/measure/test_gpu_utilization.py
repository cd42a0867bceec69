"""The regression against a closed form, rankings on latencies made up to order, and the system end to end."""

from __future__ import annotations

import random

import numpy as np
import pytest

from layerwise.measure.hardware import Machine
from layerwise.nets.cnn_space import sampled
from layerwise.systems.measure.gpu_utilization import Measured, described, ranked, ridge
from layerwise.testing import check_system


def test_ridge_equals_least_squares_without_strength() -> None:
    rng = np.random.default_rng(0)
    x, unseen, slope = rng.normal(size=(30, 3)), rng.normal(size=(5, 3)), np.array([1.0, -2.0, 0.5])
    assert ridge(x, x @ slope + 4, unseen, 0.0) == pytest.approx(unseen @ slope + 4, rel=1e-6)


def test_use_that_follows_intensity_is_learned() -> None:
    """Latency is operations over a use that grows with intensity: the way through utilization must see it."""
    draw, space = random.Random(0), []
    for plan in sampled(60, 0):
        operations, intensity = draw.uniform(1e6, 2e6), draw.uniform(1, 50)
        space.append(Measured(plan, operations, operations / intensity, operations / (intensity * 1e6)))
    found = ranked(space, Machine(1e9, 1e9), 20, draw)
    assert found["by utilization"] > 0.9
    assert found["by utilization"] > found["operations alone"] + 0.3
    assert found["by utilization"] > found["utilization of other networks"] + 0.3


def test_operations_alone_are_ranked_as_they_are() -> None:
    space = [Measured(plan, 1e6 * (k + 1), 1e5, 1e-3 * (k + 1)) for k, plan in enumerate(sampled(12, 0))]
    assert ranked(space, Machine(1e9, 1e9), 6, random.Random(0))["operations alone"] == pytest.approx(1)
    assert len({len(described(net)) for net in space}) == 1


@pytest.mark.slow
def test_it_runs() -> None:
    assert len(check_system("gpu-utilization")) == 4
