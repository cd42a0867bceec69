"""Caches of integers as a choice: what they are predicted to lose is what they lose, and they are served as planned."""

from __future__ import annotations

from pathlib import Path

import pytest

from layerwise.allocate.apply import apply
from layerwise.allocate.budget import Budget
from layerwise.allocate.plan import Edit
from layerwise.errors import BadPlan
from layerwise.export import EXPORTS
from layerwise.measure.engine import measure
from layerwise.measure.response import CACHES, Response
from layerwise.nets.compiled import library
from layerwise.report.alternatives import defaults_for, parse_alternatives, reading, trying
from layerwise.report.decide import Decide, asked
from layerwise.report.layers import kept_layers, layer_changes
from layerwise.serve.engine import Engine
from layerwise.serve.pool import Int4Pool, Int8Pool, Pool
from layerwise.serve.table import layer_table
from layerwise.spec import Attention, FeedForward, LayerSpec, StackSpec
from layerwise.stack.decoder import DecoderStack
from layerwise.stack.open import open
from layerwise.testing.stacks import random_stack
from tests.report.test_cache_budget import ROW, by_hand, check_served, lost, planned, refusal, text


@pytest.fixture(scope="module")
def stack() -> DecoderStack:
    return random_stack(6)


@pytest.fixture(scope="module")
def slim(stack: DecoderStack) -> DecoderStack:
    return planned(stack, "28%", "cache")


@pytest.mark.parametrize("part", CACHES)
def test_a_trial_loses_what_the_plan_loses(stack: DecoderStack, part: str) -> None:
    found = measure(stack, text(), [Response(False, (), (), None, caches=tuple(CACHES))], progress=False)
    kl = lost(stack, Edit(4, "cache-precision", {"precision": CACHES[part]}))
    assert kl > 0 and found[f"response:{part}"].values[4] == pytest.approx(kl, rel=1e-3)


def test_a_budget_takes_the_harsher_code_where_it_costs_least(stack: DecoderStack, slim: DecoderStack) -> None:
    """A token of a head of 16 numbers takes 64 bytes in float32, 20 in 8 bits, 12 in 4."""
    kinds = [row.mixer.cache for row in slim.spec.rows if isinstance(row.mixer, Attention)]
    assert set(kinds) == {"int8", "int4"}
    assert slim.spec.cache_bytes() <= 0.28 * stack.spec.cache_bytes()
    assert slim.origin is not None
    changes = layer_changes(stack.spec, slim.spec, kept_layers(stack.spec, slim.origin[1]))
    assert {change.got for change in changes[:6]} == {"cache int8", "cache int4"}


def test_what_is_saved_serves_as_planned(slim: DecoderStack, tmp_path: Path) -> None:
    again = open(slim.save(tmp_path / "model"))
    assert isinstance(again, DecoderStack) and again.spec == slim.spec
    engine = Engine(again, cache_tokens=2048, block=3, step_tokens=7)
    assert {type(pool) for pool in engine.runner.pools} == {Int8Pool, Int4Pool}
    for pool, row in zip(engine.runner.pools, again.spec.rows, strict=True):
        assert isinstance(pool, Pool) and isinstance(row.mixer, Attention)
        assert (pool.attended(row.mixer) is not None) == (library() is not None)  # read where they lie
    assert sum(group.token_bytes for group in engine.table.groups) == slim.spec.cache_bytes()
    check_served(engine, slim)


def test_what_the_command_line_says_comes_before_what_the_model_says(slim: DecoderStack) -> None:
    assert {entry.precision for entry in layer_table(slim.spec, precision="int8").layers} == {"int8"}


@pytest.mark.parametrize("target", [target for target in EXPORTS if target != "peft-ranks"])
def test_exports_say_that_they_cannot(stack: DecoderStack, slim: DecoderStack, target: str, tmp_path: Path) -> None:
    assert "cache" in refusal(stack, slim, target, tmp_path)


def test_a_joint_plan_mixes_formats_and_caches() -> None:
    stack = random_stack(4, dtype="bfloat16")
    decide = Decide(Budget(cache="60%", bytes="60%"), parse_alternatives(["8", "4/16", "cache"], stack.spec))
    scores = measure(stack, text(), trying(decide.alternatives), progress=False)
    scores = scores.merge(measure(stack, text(6, 2), reading(decide.alternatives), progress=False))
    plan = decide(scores, "milp")
    edited = plan.edited(stack.spec)
    assert edited.cache_bytes() <= 0.6 * stack.spec.cache_bytes() and edited.bytes() <= 0.6 * stack.spec.bytes()
    assert {edit.transform for edit in plan.edits} == {"quantize", "cache-precision"}
    assert apply(stack, plan, text(6, 2)).spec == edited


@pytest.mark.parametrize("only", [["width", "cache"], ["width", "cache", "8"]])
def test_a_layer_gets_fewer_heads_and_a_coarser_cache(only: list[str], tmp_path: Path) -> None:
    """4 bits of all heads take 19 % of float32, of half of them 9 %."""
    stack = random_stack(4, row=ROW)
    decide = asked(Budget(cache="15%"), stack.spec, only)
    scores = measure(stack, text(), trying(decide.alternatives), progress=False)
    scores = scores.merge(measure(stack, text(6, 2), reading(decide.alternatives), progress=False))
    slim = apply(stack, decide(scores, "milp"), text(6, 2))
    mixers = [row.mixer for row in slim.spec.rows if isinstance(row.mixer, Attention)]
    assert any(mixer.kv_heads == 1 and mixer.cache == "int4" for mixer in mixers)
    assert slim.spec.cache_bytes() <= 0.15 * stack.spec.cache_bytes()
    again = open(slim.save(tmp_path / "model"))
    assert isinstance(again, DecoderStack) and again.spec == slim.spec
    check_served(Engine(again, cache_tokens=2048, block=3, step_tokens=7), slim)


def test_a_budget_of_bytes_too_small_for_formats_leaves_caches_their_codes() -> None:
    spec = random_stack(2, dtype="bfloat16").spec
    offered = {item.label for item in defaults_for(Budget(bytes="20%", cache="40%"), spec)}
    assert {"cache int4", "drop", "share 1"} <= offered


def test_layers_that_have_none_or_cannot_are_left_out() -> None:
    odd = LayerSpec(Attention(heads=2, kv_heads=1, head_dim=7, rope=None), FeedForward(width=32))
    stack = random_stack(3, row=odd)
    trials = {trial.part for trial in Response(False, (), (), None, caches=tuple(CACHES)).trials(stack)}
    assert trials == {"cache int8"}
    with pytest.raises(BadPlan, match="heads have 7 numbers"):
        by_hand(stack, Edit(0, "cache-precision", {"precision": "int4"})).edited(stack.spec)


def test_tables_without_such_caches_are_written_as_before(stack: DecoderStack, slim: DecoderStack) -> None:
    """So that plans and scores made before for them still fit."""
    assert "cache" not in stack.spec.to_json()["rows"][0]["mixer"]
    assert slim.spec.to_json()["rows"][0]["mixer"]["cache"].startswith("int")
    for one in (stack, slim):
        assert StackSpec.from_json(one.spec.to_json()) == one.spec
