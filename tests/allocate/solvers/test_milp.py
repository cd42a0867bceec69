"""MILP: equal to trying every combination, under one limit and under several."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layerwise.allocate.choices import Choice
from layerwise.allocate.solvers.milp import Milp
from layerwise.errors import BadBudget
from layerwise.testing.solvers import best, fits, problem


def total(picked: list[Choice]) -> float:
    return math.fsum(choice.loss for choice in picked)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), share=st.floats(0.15, 1), alike=st.booleans())
def test_equals_brute_force(seed: int, share: float, alike: bool) -> None:
    groups = problem(seed, layers=4, alike=alike)
    limits = {"bytes": share * sum(group[0].cost["bytes"] for group in groups)}
    optimum = best(groups, limits)
    if optimum == math.inf:
        with pytest.raises(BadBudget):
            Milp().solve(groups, limits)
        return
    assert total(Milp().solve(groups, limits)) == pytest.approx(optimum, rel=1e-6, abs=1e-9)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), size=st.integers(160, 560), layers=st.integers(1, 4))
def test_equals_brute_force_under_two_limits(seed: int, size: int, layers: int) -> None:
    groups, limits = problem(seed, layers=4), {"bytes": float(size), "layers": float(layers)}
    picked = Milp().solve(groups, limits)
    assert fits(picked, limits)
    assert total(picked) == pytest.approx(best(groups, limits), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("scale", [1e-9, 1e6])
def test_the_unit_of_the_loss_does_not_matter(scale: float) -> None:
    groups = problem(3)
    scaled = [[dataclasses.replace(choice, loss=choice.loss * scale) for choice in group] for group in groups]
    labels = [choice.label for choice in Milp().solve(groups, {"bytes": 300})]
    assert [choice.label for choice in Milp().solve(scaled, {"bytes": 300})] == labels


def test_of_equal_choices_the_first_is_taken() -> None:
    groups = [[dataclasses.replace(choice, loss=0.0) for choice in group] for group in problem(0)]
    assert {choice.label for choice in Milp().solve(groups, {"bytes": 10_000})} == {"keep"}


def test_limits_that_contradict_each_other_name_the_nearest_pair() -> None:
    groups = [[dataclasses.replace(choice, cost={**choice.cost, "milliseconds": 200 - choice.cost["bytes"]})
               for choice in group] for group in problem(0)]
    limits = {"bytes": 400.0, "milliseconds": 1000.0}
    with pytest.raises(BadBudget, match="can be met alone but not together") as caught:
        Milp().solve(groups, limits)
    assert "bytes" in caught.value.expected
    assert "ms" in caught.value.expected


def test_large_numbers_stay_within_the_limit_to_the_byte() -> None:
    generator = np.random.default_rng(0)
    groups = [[dataclasses.replace(choice, cost={"bytes": float(generator.integers(10**8, 10**9))})
               for choice in group] for group in problem(0, layers=12)]
    reached = math.fsum(min(choice.cost["bytes"] for choice in group) for group in groups)
    for limit in (reached, reached * 1.3, reached * 1.7):
        assert fits(Milp().solve(groups, {"bytes": limit}), {"bytes": limit})
