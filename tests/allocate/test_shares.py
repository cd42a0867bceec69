"""Shares by hand, and what always holds."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerwise.allocate.shares import floor_plus_proportional
from layerwise.errors import BadBudget


def test_by_hand() -> None:
    assert floor_plus_proportional([1, 1, 2], 40, 0, 40) == [10, 10, 20]
    assert floor_plus_proportional([1, 1, 2], 46, 2, 40) == [12, 12, 22]
    assert floor_plus_proportional([0, 0, 5], 30, 4, 30) == [4, 4, 22]
    assert floor_plus_proportional([0, 0, 0], 31, 4, 30) == [11, 10, 10]


def test_what_a_cap_cuts_off_goes_to_the_others() -> None:
    assert floor_plus_proportional([1, 1, 8], 30, 0, 12) == [9, 9, 12]
    assert floor_plus_proportional([1, 3, 8], 30, 0, 12) == [6, 12, 12]
    assert floor_plus_proportional([0, 0, 8], 30, 0, 20) == [5, 5, 20]


def test_the_largest_remainders_are_rounded_up() -> None:
    assert floor_plus_proportional([1, 1, 1], 10, 0, 10) == [4, 3, 3]
    assert floor_plus_proportional([1.0, 2.5, 6.5], 8, 0, 10) == [1, 2, 5]


@given(st.lists(st.floats(0, 1e9), min_size=1, max_size=40), st.integers(0, 20), st.integers(0, 500), st.data())
def test_sums_are_exact_and_bounds_kept(scores: list[float], floor: int, room: int, data: st.DataObject) -> None:
    count, cap = len(scores), floor + room
    total = data.draw(st.integers(count * floor, count * cap))
    found = floor_plus_proportional(scores, total, floor, cap)
    assert sum(found) == total
    assert all(floor <= share <= cap for share in found)
    for low, high in ((a, b) for a in range(count) for b in range(count) if scores[a] < scores[b]):
        assert found[low] <= found[high] + 1  # remainders may swap neighbours


@pytest.mark.parametrize(("scores", "total", "floor", "cap"), [
    ([1, 1], 3, 2, 9), ([1, 1], 19, 2, 9), ([1, -1], 10, 0, 10), ([1, float("nan")], 10, 0, 10)])
def test_what_cannot_be_is_refused(scores: list[float], total: int, floor: int, cap: int) -> None:
    with pytest.raises(BadBudget):
        floor_plus_proportional(scores, total, floor, cap)
