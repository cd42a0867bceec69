"""The system from end to end."""

from __future__ import annotations

import pytest

from layerwise.testing import check_system


@pytest.mark.slow
def test_it_runs() -> None:
    assert len(check_system("utilized-rank")) == 5
