"""What may be tried under a budget, and that an impossible one is refused before anything is measured."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from layerwise.allocate.apply import apply
from layerwise.allocate.budget import Budget
from layerwise.allocate.choices import defaults, make_choices
from layerwise.allocate.plan import Edit, Plan
from layerwise.data.text import Source, TextData, by_frequency
from layerwise.errors import BadBudget, BadData, BadFile, BadOption
from layerwise.measure.engine import measure
from layerwise.measure.marginal import divergence
from layerwise.measure.scores import Scores
from layerwise.report.alternatives import (
    calibrated,
    check_words,
    defaults_for,
    formats,
    parse_alternatives,
    reading,
    table_formats,
    tier_formats,
    trying,
    useful_formats,
)
from layerwise.report.decide import Decide, asked
from layerwise.report.refine import Round, corrected, refine
from layerwise.report.tried import Tried, chosen, load_tried, save_tried, try_plans
from layerwise.spec import Format, LayerSpec, StackSpec, Tiers
from layerwise.stack.decoder import DecoderStack
from layerwise.testing.stacks import random_stack


def labels(budget: Budget, spec: StackSpec) -> list[str]:
    return [alternative.label for alternative in defaults_for(budget, spec)]


def widths(budget: Budget, spec: StackSpec) -> set[int]:
    return {Format.parse(label).bits for label in useful_formats(budget, spec)}


def text(rows: int = 2, seed: int = 1) -> TextData:
    tokens_NT = torch.randint(97, (rows, 24), generator=torch.Generator().manual_seed(seed))
    return TextData(tokens_NT, "random", Source("random", "calibration", "", 24 * rows, tuple(range(rows))))


def test_formats_follow_the_budget(before_spec: StackSpec) -> None:
    assert widths(Budget(bytes="60%"), before_spec) == {8, 6, 5, 4}
    assert widths(Budget(bytes="41%"), before_spec) == {8, 6, 5, 4}
    assert widths(Budget(bits=5.0), before_spec) == {8, 6, 5, 4, 3, 2}
    assert widths(Budget(bytes="5%"), before_spec) == {8, 6, 5, 4, 3, 2}
    assert widths(Budget(milliseconds=3), before_spec) == {8, 6, 5, 4, 3, 2}
    assert widths(Budget(prefill="1.5x"), before_spec) == {8, 6, 5, 4, 3, 2}


def test_small_groups_of_8_bits_are_for_budgets_that_6_bits_fit(before_spec: StackSpec) -> None:
    for budget in (Budget(bytes="60%"), Budget(bits=7.0), Budget(milliseconds=3)):
        assert useful_formats(budget, before_spec)[:2] == ["8/32=", "8/row="]
        assert {"8/32=", "8/row="} <= set(table_formats(useful_formats(budget, before_spec)))
    assert useful_formats(Budget(bytes="33%"), before_spec)[0] == "8/row="


def test_layers_are_dropped_only_where_that_helps(before_spec: StackSpec) -> None:
    assert labels(Budget(layers=6), before_spec) == ["keep", "drop", "drop attention", "drop feed-forward"]
    assert "drop" not in labels(Budget(bytes="55%"), before_spec)
    assert "drop" in labels(Budget(bytes="25%"), before_spec)
    assert "drop" in labels(Budget(bytes="55%", parameters="90%"), before_spec)


def test_instruments_are_those_the_alternatives_need(before_spec: StackSpec) -> None:
    depth = defaults_for(Budget(layers=6), before_spec)
    assert reading(depth) == []
    (response,) = [item for item in trying(depth) if not isinstance(item, str)]
    assert set(response.parts) == {"drop", "drop attention", "drop feed-forward", "floor"}
    assert [item.name for item in reading(defaults_for(Budget(bytes="55%"), before_spec))
            if not isinstance(item, str)] == ["output-error"]


def test_words_become_alternatives(before_spec: StackSpec) -> None:
    words = ["8", "3/64", "drop", "drop-attention"]
    found = [alternative.label for alternative in parse_alternatives(words, before_spec)]
    assert found == ["keep", "8/32=", "8/row=", "3/64", "rotated", "drop", "drop attention"]
    assert [item.label for item in parse_alternatives(["8"], before_spec)] == ["keep", "8/32=", "8/row="]
    assert parse_alternatives([], before_spec) == []
    assert len(parse_alternatives(["bits", "4"], before_spec)) == len(parse_alternatives(["bits"], before_spec))
    check_words([*words, "bits", "4"])
    for word in ("7", "melt", "-4", "4/"):
        with pytest.raises(BadOption, match=word):
            check_words([word])


def test_groups_are_full_where_the_model_allows_it(before_spec: StackSpec) -> None:
    assert {Format.parse(label).group for label in formats(before_spec)} == {0, 32, 64, 192}
    for label in formats(before_spec):
        format = Format.parse(label)
        for _, columns in before_spec.rows[0].matrices(before_spec.hidden).values():
            assert columns % (format.group or columns) == 0


def test_tables_are_tried_in_one_or_two_formats_a_width(before_spec: StackSpec) -> None:
    assert table_formats(formats(before_spec)) == ["8/32=", "8/row=", "6/192", "5/192", "4/32", "4/192", "3/192"]


def test_frequent_tokens_get_the_widest_format_and_others_each_narrower_one(before_spec: StackSpec) -> None:
    rows = before_spec.vocabulary // 16
    assert tier_formats(formats(before_spec), before_spec.vocabulary) == [
        *(f"8/row=@{rows}+{label}" for label in ("6/192", "5/192", "4/192", "3/192")), f"8/row=@{rows // 4}+3/192"]
    assert tier_formats(["4/32", "4/192"], before_spec.vocabulary) == tier_formats([], 1000) == []
    assert tier_formats(["8/row=", "3/64"], 40) == ["8/row=@2+3/64"]
    assert [item.label for item in parse_alternatives(["tiers"], before_spec)][:2] == ["keep", f"8/row=@{rows}+6/192"]
    assert not any("@" in item.label for item in parse_alternatives(["bits"], before_spec))
    assert any("@" in label for label in labels(Budget(bytes="55%"), before_spec))
    assert not any("@" in label for label in labels(Budget(cache="50%"), before_spec))


@pytest.mark.parametrize("budget", [Budget(bytes="5%"), Budget(parameters="1%"), Budget(bits=0.5)])
def test_the_smallest_reachable_value_is_named_without_measuring(before_spec: StackSpec, budget: Budget) -> None:
    eight = parse_alternatives(["8"], before_spec)
    alternatives = eight if budget.parameters is None else defaults_for(budget, before_spec)
    with pytest.raises(BadBudget, match="at least"):
        Decide(budget, alternatives).check(before_spec)


def test_what_can_be_met_passes(before_spec: StackSpec) -> None:
    for budget in (Budget(bytes="55%"), Budget(layers=6), Budget(bits=6.0)):
        Decide(budget, defaults_for(budget, before_spec)).check(before_spec)


@dataclass(frozen=True)
class Steps:
    """A clock to which a dense matrix takes a millisecond, and a packed one `packed` of them."""

    packed: float = 1.0

    def row(self, row: LayerSpec) -> float:
        return sum(self.packed if name in row.formats else 1.0 for name in row.matrices(hidden=1))

    def outside(self, spec: StackSpec) -> float:
        return 1.0


def test_what_formats_cannot_meet_is_met_by_leaving_parts_out(before_spec: StackSpec) -> None:
    mild, hard = (asked(Budget(milliseconds=share, bytes=0.6), before_spec, (), clock=Steps())
                  for share in ("100%", "2x"))
    assert "drop" not in [item.label for item in mild.alternatives]
    assert "drop" in [item.label for item in hard.alternatives]
    for only, share in ((["bits"], "2x"), ((), "80x")):
        with pytest.raises(BadBudget, match="at least"):
            asked(Budget(milliseconds=share), before_spec, only, clock=Steps())


def test_limits_that_exclude_each_other_name_both_and_the_nearest_pair(before_spec: StackSpec) -> None:
    """Where packed matrices are slower, the bytes can be met, and so can the time, but not both."""
    clock, budget = Steps(packed=2.0), Budget(bytes=0.3, milliseconds="100%")
    with pytest.raises(BadBudget, match="MB with 57 ms, which can be met alone but not together") as error:
        asked(budget, before_spec, ["bits"], clock=clock)
    size, time = re.findall(r"([\d.,]+) (?:bytes|ms)", error.value.expected)
    nearest = Budget(bytes=int(size.replace(",", "")), milliseconds=float(time))
    asked(nearest, before_spec, ["bits"], clock=clock)


def test_ranks_that_the_text_cannot_show_are_refused_or_left_out(before_spec: StackSpec) -> None:
    """At a share of 0.8 the largest rank is that of 576 x 1536 matrices: 0.8 * 576 * 1536 / 2112 = 335, so 320."""
    ranked = parse_alternatives(["rank"], before_spec)
    assert calibrated(ranked, before_spec, 320, ["rank"]) == ranked
    with pytest.raises(BadData, match="319 tokens of calibration text for factors of rank 320"):
        calibrated(ranked, before_spec, 319, ["rank"])
    hard = defaults_for(Budget(bytes="20%"), before_spec)
    left = calibrated(hard, before_spec, 319, ())
    assert {item.label.partition(",")[0] for item in hard if item not in left} == {"rank 0.8"}


@pytest.fixture(scope="module")
def stack() -> DecoderStack:
    return random_stack(4, dtype="bfloat16")


@pytest.fixture(scope="module")
def decide() -> Decide:
    words = ["8", "4/16", "3/16", "drop-attention"]
    return Decide(Budget(bytes="45%"), parse_alternatives(words, random_stack(4, dtype="bfloat16").spec))


@pytest.fixture(scope="module")
def scores(stack: DecoderStack, decide: Decide) -> Scores:
    tried = measure(stack, text(), trying(decide.alternatives), progress=False)
    return tried.merge(measure(stack, text(6, 2), reading(decide.alternatives), progress=False))


def test_every_plan_meets_the_budget_and_is_measured(stack: DecoderStack, decide: Decide, scores: Scores) -> None:
    tried = try_plans(stack, scores, decide, text(6, 2), text())
    assert [point.kind for point in tried].count("plan") == 1
    best = next(point for point in tried if point.kind == "plan")
    assert best.kl == min(point.kl for point in tried if point.kind != "control")
    assert {point.name for point in tried} >= {"milp", "uniform", "random", "shuffled", "reversed"}
    for point in tried:
        assert point.bytes == point.plan.edited(stack.spec).bytes() <= 0.45 * stack.spec.bytes() and point.kl > 0


def test_a_table_keeps_frequent_tokens_wide_where_that_is_best(tmp_path: Path) -> None:
    """Text of eight tokens only: that all others have few bits costs next to nothing."""
    stack = random_stack(2, dtype="bfloat16", vocabulary=2048)
    few_NT = torch.randint(8, (4, 48), generator=torch.Generator().manual_seed(1)) * 60
    data = TextData(few_NT, "few", Source("few", "calibration", "", 192, tuple(range(4))))
    decide = Decide(Budget(bytes="36%"), parse_alternatives(["8", "4/32", "tiers"], stack.spec))
    decide.check(stack.spec)
    tried = measure(stack, data, trying(decide.alternatives, by_frequency(data, 2048)), progress=False)
    scores = tried.merge(measure(stack, data, reading(decide.alternatives), progress=False))
    plain, tiers = (scores[f"response:{label}"].outside["embedding"] for label in ("4/32", "8/row=@128+4/32"))
    assert tiers < 0.5 * plain
    best = next(point.plan for point in try_plans(stack, scores, decide, data, data) if point.kind == "plan")
    slim = apply(stack, best, data)
    assert isinstance(slim.spec.embedding_format, Tiers) and slim.spec.bytes() <= 0.36 * stack.spec.bytes()
    assert "8/row=@128+4/32" in [item.label for item in defaults(scores)]
    with pytest.raises(BadData, match="statistics"):
        apply(stack, Plan(stack.spec.fingerprint(), 2, tuple(best.of("embedding"))))
    again = apply(stack, Plan.load(best.save(tmp_path / "plan.json")), data)
    assert torch.equal(slim(few_NT), again(few_NT))


def test_a_solver_that_is_asked_for_is_taken(stack: DecoderStack, decide: Decide, scores: Scores) -> None:
    tried = try_plans(stack, scores, decide, text(6, 2), text(), solver="greedy", controls=False)
    assert {point.name.partition(",")[0] for point in tried} == {"greedy", "formats only"}


def test_a_round_corrects_the_prediction_at_the_plan_just_measured(
    stack: DecoderStack, decide: Decide, scores: Scores
) -> None:
    from layerwise.measure.marginal import Marginals

    plan = decide(scores, "milp")
    by_target: dict[int | str, float] = {}
    for edit in plan.edits:
        by_target[edit.target] = by_target.get(edit.target, 0.0) + (edit.predicted_loss or 0.0)
    seen = Marginals(2 * plan.predicted["loss"], {target: 2 * loss for target, loss in by_target.items()})
    doubled = corrected(scores, plan, seen)
    groups, _ = make_choices(doubled, decide.alternatives)
    found = {group[0].target: {str(choice.edits): choice.loss for choice in group} for group in groups}
    for target, loss in by_target.items():
        same = [value for edits, value in found[target].items()
                if edits.count("Edit(") and _same(edits, plan.of(target))]
        assert not same or same[0] == pytest.approx(2 * loss, rel=0.05)


def _same(edits: str, wanted: list[Edit]) -> bool:
    return all(str(dict(edit.arguments)) in edits for edit in wanted)


def test_a_kind_that_loses_more_than_predicted_is_charged_for_it(scores: Scores) -> None:
    from layerwise.measure.marginal import Marginals

    edits = [Edit(layer, "quantize", {"bits": 4, "matrices": ["q"]}, 0.01 * (layer + 1)) for layer in range(4)]
    edits += [Edit(layer, "drop", {"part": "attention"}, 0.02) for layer in (1, 3)]
    plan = Plan("t", 4, tuple(edits))
    saved: dict[int | str, float] = {layer: 0.01 * (layer + 1) + (0.12 if layer in (1, 3) else 0) for layer in range(4)}
    found = corrected(scores, plan, Marginals(sum(saved.values()), saved))
    drop, kept = (found[name].values[1] / scores[name].values[1] for name in ("response:drop attention", "response:q"))
    assert drop / kept == pytest.approx(6.0, rel=1e-3)


def test_refining_ends_and_never_repeats_a_plan(stack: DecoderStack, decide: Decide, scores: Scores) -> None:
    rounds = refine(stack, scores, lambda found: decide(found, "milp"), text(6, 2), text())
    assert 1 <= len(rounds) <= 3
    assert len({str(one.plan.edits) for one in rounds}) == len(rounds)
    assert Round(rounds[0].plan, 1, 1.0, 1.05).agrees and not Round(rounds[0].plan, 1, 1.0, 1.5).agrees


def test_a_first_prediction_that_is_right_in_sum_is_corrected_all_the_same(
    stack: DecoderStack, decide: Decide, scores: Scores
) -> None:
    """Unless nothing is lost beside what rounding does."""
    seen: list[Scores] = []

    def planned(found: Scores) -> Plan:
        seen.append(found)
        plan = decide(found, "milp")
        first = apply(stack, plan, text(6, 2))
        right = divergence(stack, first, text()) - found["response:floor"].values[0]
        return replace(plan, predicted=plan.predicted | {"loss": right})

    refine(stack, scores, planned, text(6, 2), text())
    assert len(seen) > 1 and seen[1] is not scores
    floor = dict.fromkeys(("embedding", "head"), 9.0)
    high = replace(scores["response:floor"], values=(9.0,) * 4, outside=floor)
    rough = replace(scores, columns=scores.columns | {high.name: high})
    assert len(refine(stack, rough, planned, text(6, 2), text())) == 1


def test_measured_plans_survive_a_file(tmp_path: Path) -> None:
    plan = Plan("t", 4, (Edit(0, "quantize", {"bits": 8}, predicted_loss=0.1),))
    points = [Tried("a", "candidate", 10, 0.1 + 0.2, plan, 0.3)]
    save_tried(points, tmp_path / "tried.json")
    assert load_tried(tmp_path / "tried.json") == points
    assert chosen(points)[0].kind == "plan"
    (tmp_path / "tried.json").write_text("[1]")
    with pytest.raises(BadFile, match="--fresh"):
        load_tried(tmp_path / "tried.json")
