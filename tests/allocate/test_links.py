"""Links between choices: what a layer reads must be there, whichever solver decides."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layerwise.allocate.budget import Budget
from layerwise.allocate.choices import Choice, dropped, keep, make_choices, mixed, narrowed, shared
from layerwise.allocate.links import Link, consistent, links, settled
from layerwise.allocate.losses import Alternative
from layerwise.allocate.plan import Edit, Plan
from layerwise.allocate.solve import allocate
from layerwise.allocate.solvers import SOLVERS
from layerwise.allocate.solvers.base import Solver
from layerwise.allocate.solvers.evolution import Evolution
from layerwise.allocate.solvers.milp import Milp
from layerwise.errors import BadBudget, BadOption, BadPlan
from layerwise.measure.scores import Column, Scores
from layerwise.nets.decoder import MATRICES
from layerwise.spec import Attention, FeedForward, LayerSpec, Rope, StackSpec
from layerwise.testing.solvers import best, fits, linked_problem
from layerwise.transform.share_kv import sources

ROW = LayerSpec(Attention(4, 2, 16), FeedForward(128))


def picked(layers: int = 3, **labels: str) -> list[Choice]:
    """Every layer kept, but those that are named: `l1="share 1"`."""
    return [next(choice for choice in group if choice.label == labels.get(f"l{layer}", "keep"))
            for layer, group in enumerate(linked_problem(0, layers))]


@pytest.mark.parametrize(("labels", "allowed"), [
    ({}, True), ({"l1": "share 1"}, True), ({"l1": "share 1", "l2": "share 2"}, True),
    ({"l1": "share 1, 4 bits", "l0": "4 bits"}, True), ({"l1": "drop", "l2": "share 2"}, True),
    ({"l1": "share 1", "l2": "share 1"}, False), ({"l0": "drop", "l1": "share 1"}, False),
    ({"l0": "narrow", "l1": "share 1"}, False), ({"l0": "drop attention", "l2": "share 2"}, False)])
def test_what_is_read_must_be_there_as_it_was(labels: dict[str, str], allowed: bool) -> None:
    assert consistent(picked(**labels)) == allowed


def test_a_link_names_who_takes_and_what_gives() -> None:
    """Choices: keep, 4 bits, narrow, drop attention, drop, and for layer 1 share 1 with and without 4 bits."""
    assert links(linked_problem(0, 2)) == (Link(1, frozenset({5, 6}), 0, frozenset({0, 1})),)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), bits=st.lists(st.integers(0, 8), min_size=4, max_size=4))
def test_once_settled_any_choices_go_together(seed: int, bits: list[int]) -> None:
    groups = linked_problem(seed, 4)
    places = [bit % len(group) for bit, group in zip(bits, groups, strict=True)]
    if not consistent([group[c] for group, c in zip(groups, places, strict=True)]):
        return
    left = settled(groups, links(groups), places)
    assert all(group[c] in kept for group, kept, c in zip(groups, left, places, strict=True))
    for turn in range(8):
        assert consistent([kept[(seed + turn * g) % len(kept)] for g, kept in enumerate(left)])


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), cache=st.integers(0, 256), size=st.integers(0, 400))
def test_milp_equals_brute_force(seed: int, cache: int, size: int) -> None:
    groups, limits = linked_problem(seed, layers=4), {"cache": cache + 0.5, "bytes": size + 0.5}
    assert sum(choice.loss for choice in Milp().solve(groups, limits)) == pytest.approx(
        best(groups, limits), rel=1e-6, abs=1e-9)


def solver(name: str) -> Solver:
    """Evolution takes a second at full length."""
    return Evolution(population=6, generations=12) if name == "evolution" else SOLVERS[name]()


@pytest.mark.parametrize("name", SOLVERS)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), cache=st.integers(1, 384), size=st.none() | st.integers(1, 600))
def test_every_solver_keeps_links_and_limits(name: str, seed: int, cache: int, size: int | None) -> None:
    groups = linked_problem(seed, layers=6)
    limits = {"cache": float(cache)} | ({"bytes": float(size)} if size is not None else {})
    try:
        found = solver(name).solve(groups, limits, seed)
    except BadBudget:
        return
    except BadOption:
        assert name == "dynamic-programming" and len(limits) == 2
        return
    assert [choice.target for choice in found] == list(range(6))
    assert consistent(found) and fits(found, limits)


def needing_links(groups: list[list[Choice]]) -> list[list[Choice]]:
    """Without the choices by which a layer gives up its cache alone."""
    return [[choice for choice in group if not choice.label.startswith(("drop", "narrow"))] for group in groups]


def test_the_smallest_that_links_allow_is_named() -> None:
    """Of 6 layers one in three may keep its keys and two read them: without links, all but the first could."""
    groups = needing_links(linked_problem(0, layers=6))
    for name in ("milp", "greedy", "dynamic-programming", "evolution", "random"):
        for limit in (63.0, 127.0):
            with pytest.raises(BadBudget, match="at least 128 bytes of cache per token"):
                solver(name).solve(groups, {"cache": limit})
        assert sum(choice.cost["cache"] for choice in solver(name).solve(groups, {"cache": 128.0})) == 128


@pytest.mark.parametrize("name", ["dynamic-programming", "greedy", "evolution"])
def test_solvers_that_mend_come_near_the_best(name: str) -> None:
    """Their losses over a dozen problems, beside the least possible and those of the control."""
    total = {one: 0.0 for one in (name, "milp", "random")}
    for seed in range(12):
        groups = linked_problem(seed, layers=6)
        for one in total:
            total[one] += math.fsum(choice.loss for choice in solver(one).solve(groups, {"cache": 192.0}, seed))
    assert total["milp"] <= total[name] < total["random"]


# plans of real tables ------------------------------------------------------------------------------


def scored(spec: StackSpec, alternatives: list[Alternative], seed: int) -> Scores:
    """Losses drawn at random for whatever the alternatives look for."""
    import numpy as np

    generator = np.random.default_rng(seed)
    names = [f"response:{matrix}" for matrix in MATRICES] + [f"output-error:{matrix}:probe" for matrix in MATRICES]
    for item in alternatives:
        kind, _, setting = (item.measured or "").partition(":")
        if item.each:
            names += [f"{kind}:{matrix}:{setting}" for matrix in MATRICES]
        elif item.measured:
            names.append(item.measured.replace("leave-one-out:attention", "response:drop attention"))
    columns = {name: Column(name, tuple(generator.exponential(1, len(spec.rows)).tolist()), "nats/token", "high", "",
                            {"embedding": 1.0}) for name in dict.fromkeys(names)}
    return Scores(spec, columns)


@pytest.mark.parametrize("name", ["milp", "greedy", "evolution", "random", "shuffled", "reversed", "rank-and-cut"])
@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 10**6), share=st.floats(0.2, 0.9), alone=st.booleans())
def test_plans_can_be_carried_out(name: str, seed: int, share: float, alone: bool) -> None:
    spec = StackSpec("llama", 64, 97, (ROW,) * 5)
    alternatives = [keep(), *([] if alone else mixed(["8/row=", "3/64"])), *narrowed([0.5], spec), *shared(),
                    dropped("attention"), dropped()]
    budget = Budget(cache=share) if alone else Budget(cache=share, bytes=0.6)
    plan = allocate(scored(spec, alternatives, seed), budget, solver=solver(name), alternatives=alternatives,
                    seed=seed)
    edited = plan.edited(spec)
    assert edited.cache_bytes() == plan.predicted["cache"] <= share * spec.cache_bytes()


def test_a_table_that_shares_already_keeps_its_sources() -> None:
    """Layer 2 reads layer 0: that one may lose its feed-forward half, and neither its heads nor its attention."""
    reading = replace(ROW, mixer=replace(ROW.mixer, shares=0))  # type: ignore[type-var, arg-type]
    spec = StackSpec("llama", 64, 97, (ROW, ROW, reading))
    alternatives = [keep(), *narrowed([0.5], spec), dropped("attention"), dropped("feed_forward"), dropped()]
    for seed in range(5):
        for budget in (Budget(cache=0.5), Budget(parameters=0.6)):
            allocate(scored(spec, alternatives, seed), budget, alternatives=alternatives).edited(spec)


def test_a_plan_that_takes_a_source_away_is_refused() -> None:
    spec = StackSpec("llama", 64, 97, (ROW,) * 3)
    edits = (Edit(1, "share-kv", {"source": 0}), Edit(0, "drop", {"part": "attention"}))
    with pytest.raises(BadPlan, match="layer 1, which shares the keys and values of layer 0"):
        Plan(spec.fingerprint(), 3, edits).edited(spec)


def test_sources_are_earlier_layers_with_the_same_heads_that_look_as_far_back() -> None:
    def row(kv_heads: int = 2, window: int | None = None, theta: float = 1e4) -> LayerSpec:
        return LayerSpec(Attention(4, kv_heads, 16, window=window, rope=Rope(theta)), None)

    rows = (row(), row(window=8), row(1), row(), row(window=8), row(theta=1e6), LayerSpec(None, FeedForward(8)), row())
    spec = StackSpec("llama", 64, 97, rows)
    assert [sources(spec, layer) for layer in range(8)] == [[], [0], [], [0], [3, 1, 0], [], [], [3, 0]]
    columns = {"response:share 1": [math.nan, *[0.5] * 7], "response:share 2": [math.nan] * 4 + [0.5] * 4}
    scores = Scores(spec, {name: Column(name, tuple(values), "", "high", "") for name, values in columns.items()})
    groups, _ = make_choices(scores, [keep(), *shared()])
    assert [[edit.arguments["source"] for choice in group for edit in choice.edits] for group in groups[:8]] == [
        [], [0], [], [0], [3, 1], [], [], [3, 0]]
