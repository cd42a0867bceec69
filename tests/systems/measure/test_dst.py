"""The system from end to end on its small model."""

from __future__ import annotations

import pytest

from layerwise.testing import check_system


@pytest.mark.slow
def test_it_runs() -> None:
    checks = {check.name: check for check in check_system("dst")}
    assert len(checks) == 4
    detector = checks["alignment finds wrong answers better than doubt"]
    assert 0 <= detector.measured["alignment in the first two thirds"] <= 1
    assert abs(detector.control["alignment of other items"] - 0.5) < 0.3
