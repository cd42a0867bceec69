"""The system from end to end."""

from __future__ import annotations

import pytest

from layerwise.stack.decoder import DecoderStack
from layerwise.testing import check_system


@pytest.mark.slow
def test_it_runs(small: DecoderStack) -> None:
    checks = {check.name: check for check in check_system("depth-efficiency")}
    assert len(checks) == 5


@pytest.mark.real
@pytest.mark.slow
def test_it_runs_on_the_real_model() -> None:
    check_system("depth-efficiency")
