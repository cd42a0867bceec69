"""The roofline's arithmetic, and limits that a machine really has."""

from __future__ import annotations

import pytest

from layerwise.errors import BadOption
from layerwise.measure.hardware import Machine, bandwidth, peak

LIMITS = Machine(peak=100.0, bandwidth=10.0)


def test_memory_is_the_limit_below_the_balance() -> None:
    assert LIMITS.balance == 10
    assert LIMITS.seconds(50, 10) == 1
    assert LIMITS.seconds(500, 10) == 5


def test_shares_of_peak_and_of_the_limit() -> None:
    assert LIMITS.utilization(50, 2) == 0.25
    assert LIMITS.attained(50, 10, 2) == 0.5


def test_measured_limits_are_plausible() -> None:
    import torch

    assert 1e8 < peak(torch.float32, size=256) < 1e14
    assert 1e8 < bandwidth(count=1 << 20) < 1e13


def test_impossible_limits_are_refused() -> None:
    with pytest.raises(BadOption, match="above zero"):
        Machine(0.0, 1.0)
