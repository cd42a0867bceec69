"""The system from end to end."""

from __future__ import annotations

import pytest

from layerwise.testing import check_system


@pytest.mark.slow
def test_it_runs() -> None:
    checks = {check.name: check for check in check_system("torchntk")}
    assert checks["all routes give the same parts"].holds
