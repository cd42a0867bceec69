"""Criteria of effective depth on curves known by hand."""

from __future__ import annotations

from layerwise.measure.effective import cosine_depth, kl_depth, last_above, overlap_depth, shares


def test_the_cosine_depth_is_the_last_turn_of_the_mean_upwards() -> None:
    assert cosine_depth([[-1, 1, -1, 1, 1], [-1, 1, -1, 1, 1]]) == 2
    assert cosine_depth([[-3, 1], [1, 1]]) == 0
    assert cosine_depth([[1, 1, 1]]) is None
    assert cosine_depth([[1, -1, -1]]) is None


def test_the_kl_depth_is_where_half_of_the_largest_is_left() -> None:
    assert kl_depth([4, 8, 5, 3.9, 1]) == 3
    assert kl_depth([8, 8, 8]) is None
    assert kl_depth([8, 5, 3], share=0.7) == 1


def test_outliers_can_be_left_out_of_the_largest() -> None:
    assert kl_depth([100, 30, 8, 6, 3], rank=0) == 1
    assert kl_depth([100, 30, 8, 6, 3], rank=2) == 4


def test_the_overlap_depth_is_the_first_above_the_threshold() -> None:
    assert overlap_depth([0, 0.3, 0.31, 0]) == 2
    assert overlap_depth([0, 0.1]) is None


def test_the_last_depth_that_still_matters() -> None:
    assert last_above([9, 4, 5, 1, 0]) == 2
    assert last_above([99, 4, 5, 1, 0], first=1) == 2
    assert last_above([0, 0, 0]) is None


def test_shares_count_layers_from_one() -> None:
    assert shares({"kl": 23, "overlap": None}, 30) == {"kl": 0.8, "overlap": None}
