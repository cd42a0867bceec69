"""Confidence sequences hold at all times together; the stop rule decides what it may and no more."""

from __future__ import annotations

import math

import numpy as np
import pytest

from layerwise.data.bootstrap import Interval
from layerwise.data.sequential import Stop, asymptotic, bernstein, unseen, verdict
from layerwise.errors import BadOption


def test_bernstein_follows_its_formula_step_by_step() -> None:
    x_N, alpha = np.array([0.2, 0.9, 0.4, 0.4, 0.7]), 0.1
    mean, variance, total, squares, weights, sums, spread = 0.5, 0.25, 0.5, 0.25, 0.0, 0.0, 0.0
    for t, x in enumerate(x_N, start=1):
        bet = min(math.sqrt(2 * math.log(2 / alpha) / (variance * t * math.log(1 + t))), 0.5)
        spread += 4 * (x - mean) ** 2 * (-math.log(1 - bet) - bet) / 4
        weights, sums, total = weights + bet, sums + bet * x, total + x
        mean = total / (t + 1)
        squares += (x - mean) ** 2
        variance = squares / (t + 1)
    half = (math.log(2 / alpha) + spread) / weights
    expected = max(sums / weights - half, 0), min(sums / weights + half, 1)
    assert bernstein(x_N, 0, 1, 1 - alpha) == pytest.approx(expected)


def test_other_ends_only_shift_and_stretch() -> None:
    x_N = np.random.default_rng(0).choice([0.0, 0.5, 1.0], 400)
    low, high = bernstein(x_N, 0, 1)
    assert bernstein(2 * x_N - 1, -1, 1) == pytest.approx((2 * low - 1, 2 * high - 1))


def share_of_misses(kind: str, runs: int = 200, items: int = 120) -> float:
    """How often the true mean is outside at any of many looks."""
    draw, missed = np.random.default_rng(7), 0
    for _ in range(runs):
        if kind == "bounded":
            x_N, true = draw.choice([-1.0, 0.0, 1.0], items, p=[0.15, 0.75, 0.1]), -0.05
            ends = [bernstein(x_N[:n], -1, 1, 0.9) for n in range(8, items + 1, 2)]
        else:
            x_N, true = draw.gamma(2.0, 0.5, items), 1.0
            ends = [asymptotic(x_N[:n], 0.9, items) for n in range(8, items + 1, 2)]
        missed += any(not low <= true <= high for low, high in ends)
    return missed / runs


@pytest.mark.parametrize("kind", ["bounded", "losses"])
def test_the_mean_stays_inside_at_all_looks_together(kind: str) -> None:
    assert share_of_misses(kind) <= 0.1 + 3 * math.sqrt(0.1 * 0.9 / 200)


def test_they_narrow_as_items_come() -> None:
    x_N = np.random.default_rng(1).normal(0, 1, 3000).clip(-3, 3)
    for few, many in ((bernstein(x_N[:100], -3, 3), bernstein(x_N, -3, 3)), (asymptotic(x_N[:100]), asymptotic(x_N))):
        assert few[0] < many[0] < 0 < many[1] < few[1]
    assert asymptotic(x_N, at=3000)[1] < 4 / math.sqrt(3000)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(-0.005, 0.01, "within"), (0.011, 0.02, "above"), (-0.03, -0.02, "below"), (-0.005, 0.02, "open")],
)
def test_a_verdict_says_where_the_interval_lies(low: float, high: float, expected: str) -> None:
    assert verdict(Interval(low, (low + high) / 2, high), 0.01) == expected


def test_it_stops_when_the_difference_is_clear_and_not_before_the_least() -> None:
    stop, noise_N = Stop(0.01), np.random.default_rng(0).normal(0, 0.002, 100)
    assert stop.early_interval(noise_N[:7], None, 100) is None
    small, large = stop.early_interval(noise_N[:12], None, 100), stop.early_interval(noise_N[:12] + 0.1, None, 100)
    assert small and large and (verdict(small, 0.01), verdict(large, 0.01)) == ("within", "above")
    assert stop.early_interval(noise_N[:12] + 0.01, None, 100) is None
    assert stop.early_interval(noise_N, None, 100) is None


def test_items_that_all_agree_do_not_stop_it_at_once() -> None:
    assert Stop(0.05).early_interval(np.zeros(40), (-1, 1), 400) is None


def test_what_is_left_for_the_end_completes_the_level() -> None:
    stop = Stop(0.01, level=0.95, early=0.01)
    assert (1 - stop.last_level) + stop.early == pytest.approx(1 - stop.level)


def test_what_was_never_seen_may_still_happen() -> None:
    assert unseen(100, 0.95) == pytest.approx(0.03, abs=0.001)


@pytest.mark.parametrize("options", [{"tolerance": 0}, {"tolerance": 0.1, "early": 0.2},
                                     {"tolerance": 0.1, "least": 1}])
def test_settings_that_make_no_sense_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(BadOption, match="tolerance"):
        Stop(**options)  # type: ignore[arg-type]
