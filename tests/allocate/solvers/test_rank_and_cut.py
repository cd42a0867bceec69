"""Rank-and-cut: two levels, the least important layers first, no further than needed."""

import math

import pytest

from layerwise.allocate.solvers.rank_and_cut import RankAndCut
from layerwise.errors import BadBudget
from layerwise.testing.solvers import problem


def test_drops_the_layers_that_lose_least() -> None:
    groups = problem(4)
    picked = RankAndCut().solve(groups, {"layers": 4.0})
    dropped = {choice.target for choice in picked if choice.label == "drop"}
    ranked = sorted(groups[:6], key=lambda group: group[-1].loss)
    assert dropped == {group[0].target for group in ranked[:2]}
    assert {choice.label for choice in picked if choice.target not in dropped} == {"keep"}


def test_two_named_levels() -> None:
    groups = problem(4)
    picked = RankAndCut(high="8 bits", low="4 bits").solve(groups, {"bytes": 7 + 75 + 4 * 50 + 2 * 30})
    assert [choice.label for choice in picked].count("4 bits") == 2
    assert [choice.label for choice in picked].count("8 bits") == 5
    low = {choice.target for choice in picked if choice.label == "4 bits"}
    four = sorted(groups[:6], key=lambda group: group[2].loss)
    assert low == {group[0].target for group in four[:2]}


def test_cutting_everything_may_not_be_enough() -> None:
    with pytest.raises(BadBudget, match=r"rank-and-cut[\s\S]*262 bytes"):
        RankAndCut(high="8 bits", low="4 bits").solve(problem(4), {"bytes": 200})


def test_stops_as_soon_as_the_limit_holds() -> None:
    groups = problem(5)
    for limit in (640, 540, 440):
        picked = RankAndCut().solve(groups, {"bytes": limit})
        spent = math.fsum(choice.cost["bytes"] for choice in picked)
        assert limit - 100 < spent <= limit
