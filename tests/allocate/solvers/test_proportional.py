"""Proportional: more important layers keep at least as much, none falls below the floor."""

import dataclasses
import math

import pytest

from layerwise.allocate.solvers.proportional import Proportional
from layerwise.errors import BadBudget
from layerwise.testing.solvers import fits, problem


@pytest.mark.parametrize("seed", range(5))
def test_important_layers_keep_more(seed: int) -> None:
    groups = problem(seed)
    limits = {"bytes": 350.0}
    picked = Proportional().solve(groups, limits)[:6]
    by_importance = sorted(range(6), key=lambda g: groups[g][-1].loss)
    kept = [picked[g].cost["bytes"] for g in by_importance]
    assert kept == sorted(kept)
    assert fits(picked, limits)


def test_no_layer_falls_below_the_floor() -> None:
    picked = Proportional(floor=0.25).solve(problem(1), {"bytes": 300.0})
    assert min(choice.cost["bytes"] for choice in picked[:6]) == 30


def test_a_floor_above_the_budget_says_what_it_needs() -> None:
    with pytest.raises(BadBudget, match=r"proportional[\s\S]*382 bytes"):
        Proportional(floor=0.5).solve(problem(1), {"bytes": 300.0})


def test_equal_layers_get_the_same() -> None:
    first, *_, embedding, rest = problem(1)
    groups = [[dataclasses.replace(choice, target=layer) for choice in first] for layer in range(6)]
    picked = Proportional().solve([*groups, embedding, rest], {"bytes": 400.0})
    assert len({choice.label for choice in picked[:6]}) == 1
    assert math.fsum(choice.cost["bytes"] for choice in picked) <= 400
