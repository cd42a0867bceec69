"""Controls: plans that fit the budget without, or against, what was measured."""

import math
from collections import Counter

import pytest

from layerwise.allocate.choices import Choice
from layerwise.allocate.solvers.milp import Milp
from layerwise.allocate.solvers.random_fill import RandomFill
from layerwise.allocate.solvers.rank_and_cut import RankAndCut
from layerwise.allocate.solvers.reversed_losses import ReversedLosses
from layerwise.allocate.solvers.shuffled import Shuffled
from layerwise.allocate.solvers.uniform import Uniform
from layerwise.errors import BadBudget
from layerwise.testing.solvers import fits, problem


def labels(picked: list[Choice]) -> list[str]:
    return [choice.label for choice in picked]


def loss(picked: list[Choice]) -> float:
    return math.fsum(choice.loss for choice in picked)


def test_uniform_takes_the_best_level_that_fits() -> None:
    assert labels(Uniform().solve(problem(0), {"bytes": 390})) == ["8 bits"] * 7 + ["keep"]
    assert labels(Uniform().solve(problem(0), {"bytes": 381})) == ["4 bits"] * 6 + ["8 bits", "keep"]
    assert labels(Uniform().solve(problem(0), {"bytes": 10_000})) == ["keep"] * 8


def test_uniform_spreads_removed_layers_evenly() -> None:
    picked = Uniform().solve(problem(0, layers=6), {"layers": 4})
    assert [choice.target for choice in picked if choice.label == "drop"] == [1, 4]


def test_uniform_may_not_fit_where_a_mixture_does() -> None:
    groups = [[choice for choice in group if choice.label != "drop"] for group in problem(0)]
    groups[2] = groups[2][:1]
    with pytest.raises(BadBudget, match="uniform"):
        Uniform().solve(groups, {"bytes": 400})


@pytest.mark.parametrize("seed", range(5))
def test_random_fills_the_budget_and_depends_on_the_seed(seed: int) -> None:
    groups, limits = problem(0), {"bytes": 400.0}
    picked = RandomFill().solve(groups, limits, seed)
    room = 400 - math.fsum(choice.cost["bytes"] for choice in picked)
    dearer = [other.cost["bytes"] - mine.cost["bytes"] for mine, group in zip(picked, groups, strict=True)
              for other in group if other.cost["bytes"] > mine.cost["bytes"]]
    assert room < min(dearer)
    assert labels(picked) != labels(RandomFill().solve(groups, limits, seed + 1))


def test_random_reaches_a_limit_exactly() -> None:
    picked = RandomFill().solve(problem(0, layers=10), {"layers": 7.0}, 3)
    assert labels(picked)[:10].count("drop") == 3


def test_shuffled_keeps_size_and_histogram() -> None:
    groups, limits = problem(1, layers=12), {"bytes": 500.0}
    exact = Milp().solve(groups, limits)
    plans = [Shuffled().solve(groups, limits, seed) for seed in range(5)]
    for plan in plans:
        assert Counter(labels(plan)) == Counter(labels(exact))
        assert fits(plan, limits)
        assert loss(plan) >= loss(exact) - 1e-6
        assert plan[12:] == exact[12:]
    assert len({tuple(labels(plan)) for plan in plans}) > 1


def test_reversed_drops_the_most_important_layers() -> None:
    groups, limits = problem(4), {"layers": 4.0}
    for reference in (Milp(), RankAndCut()):
        picked = ReversedLosses(reference).solve(groups, limits)
        dropped = {choice.target for choice in picked if choice.label == "drop"}
        assert dropped == {group[0].target for group in sorted(groups[:6], key=lambda g: g[-1].loss)[-2:]}


def test_controls_lose_more_than_the_exact_plan() -> None:
    reversed_total = exact_total = 0.0
    for seed in range(5):
        groups, limits = problem(seed, layers=10), {"bytes": 450.0}
        exact = loss(Milp().solve(groups, limits))
        for control in (Uniform(), RandomFill(), Shuffled(), ReversedLosses()):
            assert loss(control.solve(groups, limits, seed)) >= exact - 1e-6
        reversed_total += loss(ReversedLosses().solve(groups, limits))
        exact_total += exact
    assert reversed_total > 1.2 * exact_total
