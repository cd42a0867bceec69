"""Greedy: always within the limits, never better than exact, and close to it."""

import math

from hypothesis import given, settings
from hypothesis import strategies as st

from layerwise.allocate.solvers.greedy import Greedy
from layerwise.testing.solvers import best, fits, problem


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), share=st.floats(0.2, 1), alike=st.booleans())
def test_feasible_and_not_better_than_exact(seed: int, share: float, alike: bool) -> None:
    groups = problem(seed, layers=4, alike=alike)
    limits = {"bytes": share * sum(group[0].cost["bytes"] for group in groups)}
    picked = Greedy().solve(groups, limits)
    assert fits(picked, limits)
    assert math.fsum(choice.loss for choice in picked) >= best(groups, limits) - 1e-9


def test_close_to_exact_on_average() -> None:
    ratios = []
    for seed in range(20):
        groups = problem(seed, layers=5)
        limits = {"bytes": 0.5 * sum(group[0].cost["bytes"] for group in groups)}
        ratios.append(math.fsum(c.loss for c in Greedy().solve(groups, limits)) / best(groups, limits))
    assert sum(ratios) / len(ratios) < 1.1


def test_nothing_is_given_up_without_need() -> None:
    groups = problem(0)
    assert {choice.label for choice in Greedy().solve(groups, {"bytes": 10_000.0})} == {"keep"}


def test_several_limits() -> None:
    limits = {"bytes": 420.0, "layers": 5.0}
    assert fits(Greedy().solve(problem(2), limits), limits)
