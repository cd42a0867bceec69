"""Budgets of every rule, and the system from end to end."""

from __future__ import annotations

import pytest

from layerwise.systems.generate.zigzagkv import EQUAL, NEED, RULES, ZIGZAG, Case
from layerwise.testing import check_system

CASE = Case(list(range(400)), [1], {NEED: (10.0, 50.0, 20.0, 120.0)})


def test_every_rule_spends_the_same() -> None:
    budgets = {name: rule(CASE, 80, 0) for name, rule in RULES.items()}
    assert all(sum(found) == 4 * 80 for found in budgets.values())
    assert budgets[ZIGZAG] == [42, 80, 52, 146]  # 33 each, and 188 in proportion
    assert budgets[EQUAL] == [80] * 4
    assert budgets["by need, reversed"] == [146, 52, 80, 42]
    assert sorted(budgets["by need, shuffled"]) == sorted(budgets[ZIGZAG])
    assert budgets["pyramid"] == sorted(budgets["pyramid"], reverse=True)


def test_no_layer_keeps_more_than_the_prompt() -> None:
    assert max(RULES[ZIGZAG](Case(list(range(100)), [1], {NEED: (1.0, 1.0, 99.0)}), 60, 0)) == 100


@pytest.mark.usefixtures("small")
def test_it_runs() -> None:
    premise, texts, needles, near = check_system("zigzagkv")
    assert len(premise.measured["tokens for 90 % of attention"]) == 30
    assert set(texts.control) == {"whole cache, 20%", f"{EQUAL}, 20%"} == set(needles.control)
    assert {"perplexity", "found"} == set(needles.measured[f"{ZIGZAG}, 20%"])
    assert premise.holds is texts.holds is needles.holds is near.holds is None


@pytest.mark.real
@pytest.mark.slow
def test_it_runs_on_the_real_model() -> None:
    check_system("zigzagkv")
