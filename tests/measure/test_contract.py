"""Every registered instrument keeps the contract, at its defaults and at other settings."""

from __future__ import annotations

import pytest

from layerwise.measure import INSTRUMENTS
from layerwise.measure.angular_distance import AngularDistance
from layerwise.measure.base import Instrument
from layerwise.measure.leave_one_out import LeaveOneOut
from layerwise.measure.quantization_sensitivity import QuantizationSensitivity
from layerwise.measure.zd import ZScoreDistribution
from layerwise.testing.instruments import check_instrument

OTHERS = [
    AngularDistance(3),
    LeaveOneOut(tokens=None),
    QuantizationSensitivity(bits=(4,), per="matrix", metric="loss", method="search", tokens=5),
    ZScoreDistribution(two_sided=True, pool="matrices"),
]


@pytest.mark.parametrize("name", INSTRUMENTS)
def test_defaults(name: str) -> None:
    check_instrument(INSTRUMENTS[name]())


@pytest.mark.parametrize("instrument", OTHERS, ids=lambda instrument: instrument.name)
def test_other_settings(instrument: Instrument) -> None:
    check_instrument(instrument)
