"""Dynamic programming: exact where the unit divides costs, never over the limit where it does not."""

import dataclasses
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layerwise.allocate.solvers.dynamic_programming import DynamicProgramming
from layerwise.allocate.solvers.milp import Milp
from layerwise.errors import BadBudget, BadOption
from layerwise.testing.solvers import best, fits, problem


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6), share=st.floats(0.1, 1), alike=st.booleans())
def test_equals_brute_force(seed: int, share: float, alike: bool) -> None:
    groups = problem(seed, layers=4, alike=alike)
    limits = {"bytes": share * sum(group[0].cost["bytes"] for group in groups)}
    optimum = best(groups, limits)
    if optimum == math.inf:
        with pytest.raises(BadBudget):
            DynamicProgramming().solve(groups, limits)
        return
    picked = DynamicProgramming().solve(groups, limits)
    assert math.fsum(choice.loss for choice in picked) == pytest.approx(optimum)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), cells=st.integers(1, 40), share=st.floats(0.2, 1))
def test_coarse_units_err_on_the_safe_side(seed: int, cells: int, share: float) -> None:
    groups = problem(seed, layers=5, alike=False)
    limits = {"bytes": share * sum(group[0].cost["bytes"] for group in groups)}
    picked = DynamicProgramming(cells=cells).solve(groups, limits)
    assert fits(picked, limits)
    least = math.fsum(min(choice.cost["bytes"] for choice in group) for group in groups)
    tighter = limits["bytes"] - len(groups) * (limits["bytes"] - least) / cells
    assert math.fsum(choice.loss for choice in picked) <= best(groups, {"bytes": tighter}) + 1e-9


def test_fractions_agree_with_milp() -> None:
    groups = [[dataclasses.replace(choice, cost={"milliseconds": choice.cost["bytes"] * math.pi})
               for choice in group] for group in problem(1, layers=8)]
    ours = DynamicProgramming(cells=50_000).solve(groups, {"milliseconds": 1300.0})
    exact = Milp().solve(groups, {"milliseconds": 1300.0})
    assert math.fsum(c.loss for c in ours) == pytest.approx(math.fsum(c.loss for c in exact), rel=1e-3)


def test_the_smallest_plan_is_found_without_any_room() -> None:
    groups = problem(0)
    least = math.fsum(min(choice.cost["bytes"] for choice in group) for group in groups)
    picked = DynamicProgramming().solve(groups, {"bytes": least})
    assert math.fsum(choice.cost["bytes"] for choice in picked) == least


def test_two_limits_are_refused() -> None:
    with pytest.raises(BadOption, match="2 limits"):
        DynamicProgramming().solve(problem(0), {"bytes": 400, "layers": 4})
