"""Combinations of alternatives within a layer: nothing useful is lost, and edits come out in a legal order."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from layerwise.allocate.apply import apply
from layerwise.allocate.budget import Budget
from layerwise.allocate.choices import (
    Choice,
    defaults,
    dropped,
    factored,
    keep,
    make_choices,
    mixed,
    narrowed,
    rotated,
    shared,
)
from layerwise.allocate.links import offers
from layerwise.allocate.losses import Alternative
from layerwise.allocate.mixtures import Option, combined, front, merged_edits
from layerwise.allocate.plan import Edit, Plan
from layerwise.allocate.solve import allocate
from layerwise.data.text import Source, TextData
from layerwise.errors import BadPlan
from layerwise.measure.engine import measure
from layerwise.measure.output_error import OutputError
from layerwise.measure.response import Response
from layerwise.measure.scores import Scores
from layerwise.spec import Attention, FeedForward, LayerSpec
from layerwise.stack.decoder import DecoderStack
from layerwise.testing.stacks import random_stack

FORMATS = ("8/row=", "4/16", "3/16", "2/16")
points = st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), min_size=1, max_size=30)


def option(label: str, loss: float, **cost: float) -> Option:
    return Option(label, (Edit(0, label, {}, loss),), loss, cost)


@given(points, st.integers(1, 2))
def test_the_front_keeps_exactly_what_nothing_beats(pairs: list[tuple[int, int]], currencies: int) -> None:
    loss_N = np.array([float(loss) for loss, _ in pairs])
    cost_NK = np.array([[float(cost), float(20 - cost)][:currencies] for _, cost in pairs])
    kept = front(loss_N, cost_NK)
    for n in range(len(pairs)):
        beaten = any(loss_N[m] <= loss_N[n] and (cost_NK[m] <= cost_NK[n]).all()
                     and (loss_N[m] < loss_N[n] or (cost_NK[m] < cost_NK[n]).any()) for m in range(len(pairs)))
        assert not (kept[n] and beaten)
        if not beaten:  # itself, or one that equals it
            equals = (loss_N == loss_N[n]) & (cost_NK == cost_NK[n]).all(1)
            assert (kept & equals).any()


group = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=4)


@given(st.lists(group, min_size=1, max_size=3), st.integers(1, 30))
def test_the_best_sum_under_a_limit_survives(parts: list[list[tuple[int, int]]], limit: int) -> None:
    groups = [[option(f"{p}", loss, bytes=float(cost)) for p, (loss, cost) in enumerate(part)] for part in parts]
    best = min((sum(o.loss for o in picked) for picked in itertools.product(*groups)
                if sum(o.cost["bytes"] for o in picked) <= limit), default=math.inf)
    found = min((o.loss for o in combined(groups, ["bytes"]) if o.cost["bytes"] <= limit), default=math.inf)
    assert found == best


def test_edits_that_differ_only_in_their_matrices_become_one_after_what_precedes_rounding() -> None:
    edits = (Edit(3, "quantize", {"bits": 4, "matrices": ("q",)}, 0.1), Edit(3, "drop", {"part": "feed_forward"}, 0.5),
             Edit(3, "quantize", {"bits": 4, "matrices": ("o",)}, 0.2))
    drop, quantize = merged_edits(edits)
    assert drop.transform == "drop"
    assert quantize.arguments["matrices"] == ["q", "o"]
    assert quantize.predicted_loss == pytest.approx(0.3)


@pytest.fixture(scope="module")
def measured() -> Scores:
    stack = random_stack()
    tokens_NT = torch.randint(50, (4, 24), generator=torch.Generator().manual_seed(0))
    return measure(stack, tokens_NT, [OutputError(FORMATS, "nearest"), Response(tables=FORMATS)],
                   progress=False)


def test_a_mixture_predicts_what_its_matrices_lose(measured: Scores) -> None:
    groups, losses = make_choices(measured)
    assert losses.unit == "nats/token"
    uniform = next(choice for choice in groups[0] if choice.label == "4/16")
    expected = sum(
        measured[f"response:{m}"].values[0] * measured[f"output-error:{m}:4/16"].values[0]
        / measured[f"output-error:{m}:probe"].values[0] for m in measured.spec.rows[0].matrices(measured.spec.hidden))
    assert uniform.loss == pytest.approx(expected)
    for choice in groups[0]:
        assert choice.row is None or choice.cost["bytes"] == choice.row.bytes(measured.spec.hidden, measured.spec.dtype)


@pytest.mark.parametrize("floor", [1e-9, 1e-6, 1e-3, 1.0])
def test_what_is_left_unspent_would_save_a_tenth_of_rounding_at_the_most(measured: Scores, floor: float) -> None:
    column = replace(measured["response:q"], name="response:floor", values=(floor,) * len(measured.spec.rows),
                     outside={"embedding": floor, "head": floor})
    spent, spare = (allocate(scores, Budget(bytes=0.7)).predicted
                    for scores in (measured, measured.merge(Scores(measured.spec, {column.name: column}))))
    assert spare["loss"] <= 1.001 * spent["loss"] + 0.1 * floor
    if floor == 1.0:
        assert spare["bytes"] < 0.9 * spent["bytes"]


def test_every_edit_of_a_mixed_plan_can_be_carried_out(measured: Scores) -> None:
    stack = random_stack()
    for share in (0.5, 0.3, 0.22):
        plan = allocate(measured, Budget(bytes=share))
        table = plan.edited(stack.spec)
        assert table.bytes() <= share * stack.spec.bytes()
        assert plan.predicted["bytes"] == table.bytes()
        tokens_NT = torch.randint(50, (4, 24), generator=torch.Generator().manual_seed(1))
        text = TextData(tokens_NT, "random", Source("random", "calibration", "", 96, (0, 1, 2, 3)))
        assert apply(stack, plan, text).spec == table


def test_a_mixture_beats_one_format_for_all(measured: Scores) -> None:
    alternatives = defaults(measured)
    for share in (0.5, 0.35):
        mixed, uniform = (allocate(measured, Budget(bytes=share), solver=name, alternatives=alternatives)
                          for name in ("milp", "uniform"))
        assert mixed.predicted["loss"] <= uniform.predicted["loss"]


def test_two_limits_hold_together(measured: Scores) -> None:
    plan = allocate(measured, Budget(bytes=0.5, layers=3))
    table = plan.edited(measured.spec)
    assert table.bytes() <= 0.5 * measured.spec.bytes()
    assert len(table.rows) <= 3


def test_factors_and_narrower_halves_take_part(structural: Scores) -> None:
    shapes = [*factored((0.5,), FORMATS[:2]), *narrowed((0.5,), structural.spec)]
    alternatives = [keep(), *mixed(FORMATS), *shapes, dropped()]
    groups, losses = make_choices(structural, alternatives)
    transforms = {edit.transform for group in groups for choice in group for edit in choice.edits}
    assert {"quantize", "narrow"} <= transforms
    narrow = narrowed((0.5,), structural.spec)[0]
    expected = (structural["response:down"].values[1] * structural["output-error:down:width 0.5"].values[1]
                / structural["output-error:down:probe"].values[1])
    assert losses.of(narrow, 1) == pytest.approx(expected)
    for group in groups[:-2]:
        for choice in group:
            size = choice.row.bytes(structural.spec.hidden, structural.spec.dtype) if choice.row else 0
            assert choice.cost["bytes"] == pytest.approx(size)


def test_a_plan_of_factors_and_narrow_halves_can_be_carried_out(structural: Scores) -> None:
    stack = random_stack()
    tokens_NT = torch.randint(50, (8, 24), generator=torch.Generator().manual_seed(1))
    text = TextData(tokens_NT, "random", Source("random", "calibration", "", 192, tuple(range(8))))
    only_rank = [keep(), *factored((0.5,), FORMATS[:2]), *narrowed((0.5,), structural.spec)]
    plan = allocate(structural, Budget(bytes=0.6), alternatives=only_rank)
    assert {edit.transform for edit in plan.edits} >= {"low-rank"}
    slim = apply(stack, plan, text)
    assert slim.spec == plan.edited(stack.spec)
    assert bool(slim(tokens_NT).isfinite().all())


@pytest.fixture(scope="module")
def structural() -> Scores:
    tokens_NT = torch.randint(50, (4, 24), generator=torch.Generator().manual_seed(0))
    errors = OutputError(FORMATS, "nearest", ranks=(0.5,), widths=(0.5,))
    return measure(random_stack(), tokens_NT, [errors, Response(tables=FORMATS)], progress=False)


@pytest.fixture(scope="module")
def rotations() -> tuple[DecoderStack, Scores]:
    stack = random_stack()
    tokens_NT = torch.randint(50, (4, 24), generator=torch.Generator().manual_seed(0))
    return stack, measure(stack, tokens_NT, [OutputError(FORMATS, rotated=True), Response(tables=FORMATS)],
                          progress=False)


def attention(choice: Choice, name: str) -> Edit | None:
    return next((edit for edit in choice.edits if name in (edit.arguments.get("matrices") or ())), None)


def test_rotated_attention_predicts_what_v_and_o_lose_after_it(rotations: tuple[DecoderStack, Scores]) -> None:
    _, scores = rotations
    groups, _ = make_choices(scores, [keep(), *mixed(["2/16"], tables=()), rotated()])
    turned = [choice for choice in groups[0] if any(edit.transform == "learn-rotation" for edit in choice.edits)]
    assert turned
    for choice in turned:
        assert choice.edits[0].transform == "learn-rotation" and attention(choice, "o") is not None
        expected = 0.0
        for matrix in scores.spec.rows[0].matrices(64):
            if attention(choice, matrix):
                column = f"{matrix}:rotated 2/16" if matrix in ("v", "o") else f"{matrix}:2/16"
                expected += (scores[f"response:{matrix}"].values[0] * scores[f"output-error:{column}"].values[0]
                             / scores[f"output-error:{matrix}:probe"].values[0])
        assert choice.loss == pytest.approx(expected)
        alike = [other for other in groups[0] if other not in turned and other.row == choice.row]
        assert all(other.cost == pytest.approx(choice.cost) for other in alike)


def test_rotation_is_offered_only_where_it_was_measured_and_nothing_shares_the_values(
        rotations: tuple[DecoderStack, Scores], measured: Scores) -> None:
    def offered(scores: Scores, *more: Alternative) -> list[bool]:
        groups, _ = make_choices(scores, [keep(), *mixed(FORMATS), rotated(), *more])
        return [any(edit.transform == "learn-rotation" for choice in group for edit in choice.edits)
                for group in groups[:2]]

    assert offered(rotations[1]) == [True, True]
    assert offered(measured) == [False, False]
    assert offered(rotations[1], *shared()) == [True, True]
    groups, _ = make_choices(rotations[1], [keep(), *mixed(FORMATS), rotated()])
    for choice in groups[0]:
        assert (offers(choice) is None) == any(edit.transform == "learn-rotation" for edit in choice.edits)


def test_a_plan_with_rotations_is_carried_out_and_reloads(rotations: tuple[DecoderStack, Scores],
                                                          tmp_path: Path) -> None:
    stack, scores = rotations
    plan = allocate(scores, Budget(bytes=0.35), alternatives=[keep(), *mixed(FORMATS), rotated()])
    assert any(edit.transform == "learn-rotation" for edit in plan.edits)
    tokens_NT = torch.randint(50, (4, 24), generator=torch.Generator().manual_seed(0))
    data = TextData(tokens_NT, "random", Source("random", "calibration", "", 96, (0, 1, 2, 3)))
    slim, tokens_BT = apply(stack, plan, data), torch.arange(12).view(2, 6)
    assert slim.spec.bytes() <= 0.35 * stack.spec.bytes()
    plan.save(tmp_path / "plan.json")
    again = apply(stack, Plan.load(tmp_path / "plan.json"), data)
    assert torch.equal(again(tokens_BT), slim(tokens_BT))


def test_values_that_another_layer_shares_stay_as_they_are() -> None:
    row = LayerSpec(Attention(4, 2, 16), FeedForward(96))
    stack = random_stack(2, row=row)
    edits = (Edit(0, "rotate-values"), Edit(1, "share-kv", {"source": 0}))
    with pytest.raises(BadPlan, match="rotate-values for layer 0, whose values layer 1 shares"):
        apply(stack, Plan(stack.spec.fingerprint(), 2, edits))
