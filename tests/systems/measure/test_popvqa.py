"""The system from end to end, on a model that knows nothing and on the trained one."""

from __future__ import annotations

import pytest

from layerwise.testing import check_system
from tests.systems.seeing_world import credulous  # noqa: F401


@pytest.mark.usefixtures("credulous")
def test_every_line_runs_and_an_untrained_model_shows_no_gap() -> None:
    checks = {check.name: check for check in check_system("popvqa")}
    assert len(checks) == 4
    assert checks["facts are recalled less from a picture than from a name"].holds is None


@pytest.mark.slow
def test_it_runs() -> None:
    check_system("popvqa")
