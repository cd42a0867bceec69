"""`allocate` from end to end: what is planned, what is predicted, what is refused."""

import math

import pytest

import layerwise as lw
from layerwise.allocate.budget import Budget
from layerwise.allocate.choices import dropped, keep, quantized
from layerwise.allocate.plan import Plan
from layerwise.allocate.solve import allocate
from layerwise.allocate.solvers import SOLVERS
from layerwise.allocate.solvers.milp import Milp
from layerwise.allocate.solvers.rank_and_cut import RankAndCut
from layerwise.allocate.solvers.reversed_losses import ReversedLosses
from layerwise.errors import BadBudget, LayerwiseError, UnknownName
from layerwise.measure.scores import Scores
from layerwise.spec import LayerSpec, StackSpec
from tests.allocate.tables import scores, spec

BITS = (8, 6, 5, 4, 3, 2)
INFLUENCE = [0.5, 0.1, 0.2, 0.9, 0.3, 0.7]


def measured() -> Scores:
    """Losses that grow with 4^-bits and with a layer's influence."""
    columns = {f"quantization-sensitivity:{bits}": [value * 4.0**-bits for value in INFLUENCE]
               for bits in BITS}
    dropping = scores({"leave-one-out": [0.3 * value for value in INFLUENCE]})
    return scores(columns, {"embedding": 0.001}).merge(dropping)


class TenTimesTheBytes:
    """A clock that says a layer of n bytes takes n / 1000 ms."""

    def row(self, row: LayerSpec) -> float:
        return row.bytes(64, "bfloat16") / 1000

    def outside(self, spec: StackSpec) -> float:
        return spec.embedding_bytes() / 1000


def test_bytes_are_not_spent_on_what_is_lost_in_rounding() -> None:
    table = measured()
    floor = scores({"quantization-sensitivity:floor": [1.01 * max(INFLUENCE) * 4.0**-6] * 6})
    plan = allocate(table.merge(floor), Budget(bytes=0.9))
    for edit in plan.edits:
        if isinstance(edit.target, int):
            assert edit.arguments["bits"] <= 6  # 6 bits lose nothing that can be measured, so 8 are not bought
    assert plan.predicted["bytes"] < allocate(table, Budget(bytes=0.9)).predicted["bytes"]
    assert allocate(table.merge(floor), Budget(bytes=0.9), solver="uniform").edits == (
        allocate(table, Budget(bytes=0.9), solver="uniform").edits)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("budget", [
    Budget(bytes=0.55), Budget(bytes="3x"), Budget(layers=4), Budget(bits=5.0), Budget(parameters="80%"),
    Budget(bytes=0.6, layers=5),
], ids=str)
def test_predictions_are_exact_and_within_the_budget(name: str, budget: Budget) -> None:
    table = measured()
    try:
        plan = allocate(table, budget, solver=name)
    except LayerwiseError:
        assert name in ("dynamic-programming", "proportional", "uniform")
        return
    edited = plan.edited(table.spec)
    assert plan.predicted["bytes"] == edited.bytes()
    assert plan.predicted["parameters"] == edited.parameters()
    assert plan.predicted["layers"] == len(edited.rows)
    assert all(plan.predicted[currency] <= limit * (1 + 1e-9) for currency, limit in plan.limits.items())
    assert plan.predicted["loss"] == pytest.approx(math.fsum(edit.predicted_loss or 0 for edit in plan.edits))


def test_a_budget_the_original_meets_changes_nothing() -> None:
    assert allocate(measured(), Budget(bytes="100%")).edits == ()


def test_only_edits_that_help_the_budget_are_made() -> None:
    plan = allocate(measured(), Budget(layers=4))
    assert {(edit.target, edit.transform) for edit in plan.edits} == {(1, "drop"), (2, "drop")}


def test_important_layers_get_more_bits() -> None:
    plan = allocate(measured(), Budget(bits=4.5), alternatives=[keep(), *(quantized(bits) for bits in BITS)])
    bits = [plan.of(layer)[0].arguments["bits"] for layer in range(6)]
    order = sorted(range(6), key=INFLUENCE.__getitem__)
    assert [bits[layer] for layer in order] == sorted(bits)
    assert len(set(bits)) > 1


def test_exact_is_at_least_as_good_as_every_other_solver() -> None:
    for budget in (Budget(bytes=0.4), Budget(layers=4)):
        exact = allocate(measured(), budget).predicted["loss"]
        for name in ("greedy", "rank-and-cut", "shuffled", "reversed", "random", "uniform"):
            assert allocate(measured(), budget, solver=name).predicted["loss"] >= exact * (1 - 1e-6)


def test_milliseconds_come_from_the_clock() -> None:
    plan = allocate(measured(), Budget(milliseconds="2x"), clock=TenTimesTheBytes())
    edited = plan.edited(spec(6))
    time = (edited.embedding_bytes() + sum(row.bytes(64, "bfloat16") for row in edited.rows)) / 1000
    assert plan.predicted["milliseconds"] == pytest.approx(time)
    assert time <= plan.limits["milliseconds"]


def test_the_same_inputs_give_the_same_file() -> None:
    for name in SOLVERS:
        first, second = (allocate(measured(), Budget(bytes=0.6), solver=name, seed=3) for _ in range(2))
        assert first.to_json() == second.to_json()


def test_a_plan_says_where_it_came_from() -> None:
    misled = ReversedLosses(RankAndCut("8 bits", "4 bits"))
    plan = allocate(measured(), Budget(bytes=0.55), solver=misled, seed=5)
    assert (plan.solver, plan.seed, plan.budget, plan.model) == ("reversed", 5, {"bytes": 0.55}, "weights")
    assert plan.settings == {"reference": {"solver": "rank-and-cut", "high": "8 bits", "low": "4 bits"}}
    assert plan.loss_unit == "nats/token"
    assert "leave-one-out" in plan.columns
    assert set(plan.versions) == {"python", "numpy", "scipy", "torch"}
    assert Plan.from_json(plan.to_json()) == plan


def test_a_surrogate_is_called_relative() -> None:
    table = scores({"block-influence": INFLUENCE})
    plan = allocate(table, Budget(layers=4), alternatives=[keep(), dropped()])
    assert plan.loss_unit == "relative"
    assert [edit.target for edit in plan.edits] == [1, 2]


def test_by_chooses_the_column() -> None:
    table = scores({"block-influence": INFLUENCE, "zd": INFLUENCE[::-1]})
    plan = allocate(table, Budget(layers=4), alternatives=[keep(), dropped()], by="zd")
    assert [edit.target for edit in plan.edits] == [3, 4]


def test_an_impossible_budget_names_the_smallest() -> None:
    table = scores({"quantization-sensitivity:4": INFLUENCE})
    with pytest.raises(BadBudget, match="at least") as caught:
        allocate(table, Budget(bytes=0.05))
    smallest = int(caught.value.expected.split()[2].replace(",", ""))
    assert allocate(table, Budget(bytes=smallest)).predicted["bytes"] == smallest
    with pytest.raises(BadBudget):
        allocate(table, Budget(bytes=smallest - 1))


def test_the_share_named_is_enough_too() -> None:
    table = scores({"quantization-sensitivity:4": INFLUENCE})
    with pytest.raises(BadBudget) as caught:
        allocate(table, Budget(bytes=0.05))
    share = caught.value.expected.split("(")[1].split()[0]
    allocate(table, Budget(bytes=share))


def test_unknown_solvers_suggest_near_names() -> None:
    with pytest.raises(UnknownName, match="milp"):
        allocate(measured(), Budget(bytes=0.5), solver="mlip")


def test_the_public_call_is_this_function() -> None:
    plan = lw.allocate(measured(), budget=lw.Budget(bytes=0.55), solver=Milp())
    assert plan == allocate(measured(), Budget(bytes=0.55))
