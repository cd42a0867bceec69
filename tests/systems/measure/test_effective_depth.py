"""The system from end to end."""

from __future__ import annotations

import pytest

from layerwise.stack.decoder import DecoderStack
from layerwise.testing import check_system


@pytest.mark.slow
def test_it_runs(small: DecoderStack) -> None:
    assert len(check_system("effective-depth")) == 4


@pytest.mark.real
@pytest.mark.slow
def test_it_runs_on_the_real_model() -> None:
    check_system("effective-depth")
