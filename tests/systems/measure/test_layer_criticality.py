"""The scan's arithmetic, and the system from end to end."""

from __future__ import annotations

import pytest

from layerwise.systems.measure.layer_criticality import Scan
from layerwise.testing import check_system


def test_standard_errors_are_over_draws() -> None:
    a, b = Scan({}, [0.5, 0.7], 0.0, 0.0), Scan({}, [0.2, 0.4], 0.0, 0.0)
    assert a.above(b) == pytest.approx(0.3 / (0.02 / 2 + 0.02 / 2) ** 0.5)


def test_stages_are_the_first_part_of_the_path() -> None:
    shown = Scan({"conv1": 0.1, "layer1.0.conv1": 0.2, "layer1.0.conv2": 0.4}, [0.3], 0.5, 0.25).shown()
    assert shown == {"mean": 0.3, "conv1": 0.1, "layer1": 0.3, "disagreement": 0.5, "total variation": 0.25}
    assert Scan({}, [0.3], 0.5, 0.25, 0.75).shown()["weights zero instead"] == 0.75


@pytest.mark.slow
def test_it_runs() -> None:
    assert len(check_system("layer-criticality")) == 5
