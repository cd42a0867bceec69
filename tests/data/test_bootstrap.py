"""Intervals cover what they claim to, and pairing removes what both results share."""

from __future__ import annotations

import math

import numpy as np
import pytest

from layerwise.data.bootstrap import (
    Interval,
    interval,
    paired_interval,
    paired_ratio_interval,
    ratio_interval,
)
from layerwise.errors import BadData, BadOption

RNG = np.random.default_rng(0)


def test_mean_of_normal_items_agrees_with_theory() -> None:
    items_N = np.random.default_rng(1).normal(2.0, 3.0, 500)
    found = interval(items_N)
    half = 1.96 * items_N.std(ddof=1) / math.sqrt(500)
    assert found.value == pytest.approx(items_N.mean())
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.06)


def test_coverage_of_the_mean() -> None:
    rng = np.random.default_rng(2)
    hits = sum(1.0 in interval(rng.exponential(1.0, 60), resamples=500, seed=trial) for trial in range(200))
    assert 0.88 <= hits / 200 <= 0.99


def test_coverage_of_a_ratio_whose_items_differ_in_weight() -> None:
    rng, hits = np.random.default_rng(3), 0
    for trial in range(200):
        counts_N = rng.integers(1, 40, 50)
        sums_N = counts_N * rng.normal(2.5, 0.7, 50)
        hits += 2.5 in ratio_interval(sums_N, counts_N, resamples=500, seed=trial)
    assert 0.88 <= hits / 200 <= 0.99


def test_pairing_removes_what_both_share() -> None:
    rng = np.random.default_rng(4)
    hard_N = rng.normal(0, 10, 200)
    before_N, after_N = hard_N + rng.normal(0, 0.1, 200), hard_N + 0.05 + rng.normal(0, 0.1, 200)
    paired = paired_interval(before_N, after_N)
    assert paired.value == pytest.approx(after_N.mean() - before_N.mean())
    assert 0.0 not in paired
    assert 0.05 in paired
    assert paired.high - paired.low < 0.05 * (interval(after_N).high - interval(after_N).low)


def test_paired_mean_is_the_interval_of_the_differences() -> None:
    a_N, b_N = RNG.normal(size=(2, 40))
    one, other = paired_interval(a_N, b_N), interval(b_N - a_N)
    assert (one.low, one.high) == pytest.approx((other.low, other.high))


def test_paired_ratio_is_token_weighted() -> None:
    counts = np.array([10.0, 30.0, 60.0, 5.0])
    a, b = np.array([20.0, 70.0, 90.0, 12.0]), np.array([21.0, 72.0, 99.0, 12.0])
    found = paired_ratio_interval((a, counts), (b, counts))
    assert found.value == pytest.approx((b.sum() - a.sum()) / counts.sum())
    assert found.low <= found.value <= found.high


def test_other_statistics() -> None:
    items_N = np.random.default_rng(5).exponential(size=300)
    found = interval(items_N, np.median)
    assert found.value == np.median(items_N)
    assert math.log(2) in found


def test_same_seed_same_interval() -> None:
    items_N = RNG.normal(size=30)
    assert interval(items_N, seed=7) == interval(items_N, seed=7)
    assert interval(items_N, seed=7) != interval(items_N, seed=8)


def test_equal_items_leave_no_doubt() -> None:
    assert interval([3.0] * 12) == Interval(3.0, 3.0, 3.0)
    shifted = paired_interval([1.0, 2.0, 3.0], [2.0, 3.0, 4.0])
    assert (shifted.low, shifted.value, shifted.high) == pytest.approx((1.0, 1.0, 1.0))


def test_a_function_of_an_interval() -> None:
    found = Interval(0.0, 1.0, 2.0).map(math.exp)
    assert (found.low, found.value, found.high) == (1.0, math.e, math.exp(2))
    assert str(Interval(1.0, 2.0, 3.0)) == "2 [1, 3]"


@pytest.mark.parametrize("items", [[], [1.0], [1.0, float("nan")], [[1.0, 2.0]]])
def test_items_that_cannot_be_resampled(items: list[float]) -> None:
    with pytest.raises(BadData, match="at least two finite numbers"):
        interval(items)


def test_results_on_different_items() -> None:
    with pytest.raises(BadData, match="results on 3 and 2 items"):
        paired_interval([1, 2, 3], [1, 2])


def test_impossible_level() -> None:
    with pytest.raises(BadOption, match="level=95"):
        interval([1, 2, 3], level=95)
