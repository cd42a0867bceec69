"""Areas and shares of curves known by hand."""

from __future__ import annotations

import math

import pytest

from layerwise.systems.curve import Curve, against_chance


def test_the_area_of_a_straight_line_is_half_its_end() -> None:
    assert Curve((0, 10, 30), (2.0, 3.0, 5.0)).area == pytest.approx(1.5)


def test_a_flat_curve_has_no_area_and_lets_everything_change() -> None:
    flat = Curve((0, 5, 30), (2.0, 2.0, 2.0))
    assert flat.area == 0 and flat.share(1.05) == 1


def test_points_weigh_by_their_distance() -> None:
    assert Curve((0, 29, 30), (0.0, 0.0, 1.0)).area == pytest.approx(1 / 60)


def test_the_share_is_straight_between_points() -> None:
    growth = math.log(1.05)
    curve = Curve((0, 10, 20), (1.0, 1.0, 1.0 + 2 * growth))
    assert curve.share(1.05) == pytest.approx(15 / 20)
    assert curve.share(1.0) == pytest.approx(10 / 20)


def test_the_first_crossing_counts() -> None:
    growth = math.log(2)
    assert Curve((0, 10, 20), (1.0, 1.0 + 2 * growth, 1.0)).share(2) == pytest.approx(5 / 20)


def test_controls_are_set_apart_and_random_orders_summarised() -> None:
    curves = {name: Curve((0, 1), (0.0, end)) for name, end in
              {"lim": 2.0, "oracle": 1.0, "reversed lim": 6.0, "depth": 4.0, "random 0": 3.0, "random 1": 5.0}.items()}
    found, control = against_chance(curves, lambda curve: 2 * curve.area)
    assert found == {"lim": 2.0, "oracle": 1.0}
    assert control == {"reversed lim": 6.0, "depth": 4.0, "random mean": 4.0,
                       "random deviation": pytest.approx(math.sqrt(2), abs=1e-4)}
