"""Settings and sums by hand, and the system from end to end."""

from __future__ import annotations

import pytest

from layerwise.systems.generate.easyspec import SCALES, Round, Setting, settings
from layerwise.testing import check_system


def test_every_group_size_is_tried_with_and_without_calibration() -> None:
    full = settings(SCALES["full"])
    assert len(full) == len(set(full)) == 2 * (9 + 3)
    assert {setting.group for setting in full if setting.who == "the copy"} == {1, 4}
    assert not any(setting.group == 1 and not setting.calibrated for setting in full)
    assert str(Setting("itself", 4, False, 0.8)) == "itself, groups of 4, not calibrated"


def test_tokens_of_a_round_are_those_accepted_and_one_more() -> None:
    round = Round([[1] * 11, [1] * 11], accepted=[8, 7], drafted=[10, 15])
    assert round.length == 4.0  # 20 tokens after the first, 15 of them guessed, in 5 rounds
    assert round.share.value == 0.6


@pytest.mark.usefixtures("small")
def test_it_runs() -> None:
    law, acceptance, calibration, path = check_system("easyspec")
    assert law.holds is True and law.measured["settings"] == law.measured["of them with equal answers"] == 6
    assert acceptance.holds is calibration.holds is path.holds is None
    assert acceptance.measured["accepted"]["itself"]["temperature 0.0"]["groups of 1"].startswith("1 [")
    found = path.measured["times as fast as in order, by halves of layers in a row"]
    assert found["groups of 1"] == {"drafting stage": 1.0, "one pass": 1.0, "tokens at 0.0": 1.0}
    assert found["groups of 4"]["one pass"] == round(60 / 39, 2)


@pytest.mark.real
@pytest.mark.slow
def test_it_runs_on_the_real_model() -> None:
    check_system("easyspec")
