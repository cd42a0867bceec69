"""What may be tried under a budget, and that an impossible one is refused before anything is measured."""

from __future__ import annotations

from pathlib import Path

import pytest

from layerwise.allocate.budget import Budget
from layerwise.allocate.plan import Edit, Plan
from layerwise.data.text import Source, TextData
from layerwise.errors import BadBudget, BadFile, BadOption
from layerwise.measure.engine import measure
from layerwise.measure.quantization_sensitivity import QuantizationSensitivity
from layerwise.report.decide import Decide
from layerwise.report.optimize import defaults_for, instruments_for, parse_alternatives, useful_widths
from layerwise.report.tried import Tried, chosen, contenders, load_tried, save_tried, try_plans
from layerwise.spec import StackSpec
from layerwise.testing.stacks import random_stack


def labels(budget: Budget, spec: StackSpec) -> list[str]:
    return [alternative.label for alternative in defaults_for(budget, spec)]


def test_widths_follow_the_budget(before_spec: StackSpec) -> None:
    assert useful_widths(Budget(bytes="55%"), before_spec) == (8, 6, 4)
    assert useful_widths(Budget(bytes="45%"), before_spec) == (8, 6, 4, 3)
    assert useful_widths(Budget(bits=7.2), before_spec) == (8, 6, 4, 3)
    assert useful_widths(Budget(bytes="5%"), before_spec) == (8, 6, 4, 3, 2)
    assert useful_widths(Budget(milliseconds=3), before_spec) == (8, 6, 4, 3, 2)


def test_layers_are_dropped_only_where_that_helps(before_spec: StackSpec) -> None:
    assert labels(Budget(layers=6), before_spec) == ["keep", "drop"]
    assert labels(Budget(bytes="55%"), before_spec) == ["keep", "8 bits", "6 bits", "4 bits"]
    assert "drop" in labels(Budget(bytes="55%", parameters="90%"), before_spec)


def test_instruments_are_those_the_alternatives_need(before_spec: StackSpec) -> None:
    names = [
        instrument if isinstance(instrument, str) else instrument.name
        for instrument in instruments_for(defaults_for(Budget(layers=6), before_spec))
    ]
    assert names == ["block-influence", "logit-lens-kl", "leave-one-out"]


def test_words_become_alternatives() -> None:
    found = [alternative.label for alternative in parse_alternatives(["8", "drop", "drop-attention"])]
    assert found == ["keep", "8 bits", "drop", "drop attention"]
    assert parse_alternatives([]) == []
    for word in ("7", "melt", "-4"):
        with pytest.raises(BadOption, match=word):
            parse_alternatives([word])


@pytest.mark.parametrize("budget", [Budget(bytes="5%"), Budget(parameters="1%"), Budget(bits=0.5)])
def test_the_smallest_reachable_value_is_named_without_measuring(before_spec: StackSpec, budget: Budget) -> None:
    alternatives = parse_alternatives(["8"]) if budget.parameters is None else defaults_for(budget, before_spec)
    with pytest.raises(BadBudget, match="at least"):
        Decide(budget, alternatives).check(before_spec)


def test_what_can_be_met_passes(before_spec: StackSpec) -> None:
    for budget in (Budget(bytes="55%"), Budget(layers=6), Budget(bits=6.0)):
        Decide(budget, defaults_for(budget, before_spec)).check(before_spec)


def test_every_contender_meets_the_budget_and_is_measured() -> None:
    import torch

    stack = random_stack(4, dtype="bfloat16")
    tokens_NT = torch.randint(97, (2, 24), generator=torch.Generator().manual_seed(1))
    data = TextData(tokens_NT, "random", Source("random", "calibration", "", 48, (0, 1)))
    scores = measure(stack, data, [QuantizationSensitivity(bits=(8, 4), tokens=8)], progress=False)
    decide = Decide(Budget(bytes="60%"), parse_alternatives(["8", "4"]))
    tried = chosen(try_plans(stack, list(contenders(scores, decide)), data))
    assert [point.kind for point in tried].count("plan") == 1
    best = next(point for point in tried if point.kind == "plan")
    assert best.kl == min(point.kl for point in tried if point.kind != "control")
    assert {point.name for point in tried} >= {"milp", "greedy", "uniform", "random", "shuffled", "reversed"}
    for point in tried:
        assert point.bytes <= 0.6 * stack.spec.bytes() and point.kl > 0


def test_a_solver_that_is_asked_for_is_taken() -> None:
    tried = [Tried("milp", "candidate", 10, 0.1), Tried("reversed", "control", 10, 0.5)]
    assert [point.kind for point in chosen(tried)] == ["plan", "control"]
    assert [point.kind for point in chosen(tried, "reversed")] == ["candidate", "plan"]


def test_equal_plans_are_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from layerwise.report import tried

    calls = []

    def measured(*_: object) -> Tried:
        calls.append(1)
        return Tried("", "candidate", 10, 0.5)

    monkeypatch.setattr(tried, "_measured", measured)
    one = Plan("t", 4, (Edit(0, "quantize", {"bits": 8}, predicted_loss=0.1),))
    two = Plan("t", 4, (Edit(0, "quantize", {"bits": 8}, predicted_loss=0.9),))
    found = try_plans(random_stack(1), [("a", "plan", one), ("b", "control", two)], None)  # type: ignore[arg-type]
    assert calls == [1]
    assert found == [Tried("a", "plan", 10, 0.5), Tried("b", "control", 10, 0.5)]


def test_measured_plans_survive_a_file(tmp_path: Path) -> None:
    points = [Tried("a", "plan", 10, 0.1 + 0.2)]
    save_tried(points, tmp_path / "tried.json")
    assert load_tried(tmp_path / "tried.json") == points
    (tmp_path / "tried.json").write_text("[1]")
    with pytest.raises(BadFile, match="--fresh"):
        load_tried(tmp_path / "tried.json")
