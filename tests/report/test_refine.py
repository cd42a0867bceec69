"""Correcting predictions by what a plan was measured to lose."""

from __future__ import annotations

import pytest

from layerwise.allocate.plan import Edit, Plan
from layerwise.measure.marginal import Marginals
from layerwise.measure.scores import Column, Scores
from layerwise.report.refine import corrected
from layerwise.testing.stacks import random_stack

LAYERS = 4
PREDICTED = (0.02, 0.04, 0.01, 0.03)


def scores() -> Scores:
    column = Column("response:q", (1.0,) * LAYERS, "nats/token", "high", "", {"embedding": 1.0})
    return Scores(random_stack(LAYERS).spec, {"response:q": column})


def plan() -> Plan:
    edits = [Edit(layer, "quantize", {"bits": 4}, loss) for layer, loss in enumerate(PREDICTED)]
    return Plan("t", LAYERS, (*edits, Edit("embedding", "quantize", {"bits": 4}, 0.1)))


def factors(measured: float, saved: dict[int | str, float], floor: float = 0.0) -> list[float]:
    """What the predictions of each layer and of the table were multiplied with."""
    column = corrected(scores(), plan(), Marginals(measured, saved), floor)["response:q"]
    return [*column.values, column.outside["embedding"]]


def after(found: list[float]) -> float:
    return sum(factor * loss for factor, loss in zip(found, (*PREDICTED, 0.1), strict=True))


def test_what_was_missing_is_charged_where_undoing_shows_it() -> None:
    """Layer 1 saves 0.1 more than predicted and layer 3 a tenth of that; what seems free stays as predicted."""
    found = factors(0.25, {0: 0.02, 1: 0.14, 2: -0.01, 3: 0.04, "embedding": 0.05})
    assert after(found) == pytest.approx(0.25) and found[0] == found[2] == found[4] == 1.0
    assert (found[1] - 1) * 0.04 == pytest.approx(10 * (found[3] - 1) * 0.03)


def test_what_was_not_lost_is_taken_off_where_undoing_shows_it() -> None:
    found = factors(0.17, {0: 0.02, 1: 0.02, 2: 0.05, 3: 0.02, "embedding": 0.1})
    assert after(found) == pytest.approx(0.17) and found[0] == found[2] == found[4] == 1.0
    assert (1 - found[1]) * 0.04 == pytest.approx(2 * (1 - found[3]) * 0.03)


def test_differences_below_the_floor_say_nothing() -> None:
    """Then all are corrected alike; the floor is no loss of the plan's."""
    found = factors(0.31, {0: 0.025, 1: 0.035, 2: 0.015, 3: 0.03, "embedding": 0.1}, floor=0.01)
    assert found == pytest.approx([1.5] * 5)


def test_one_round_corrects_by_a_bounded_factor() -> None:
    assert max(factors(5.0, {0: 3.0, 1: 0.04, 2: 0.01, 3: 0.03, "embedding": 0.1})) == 4.0


@pytest.mark.parametrize(("measured", "saved"), [
    (0.0, {0: 0.02}), (0.5, {}), (0.5, {0: -0.1, 1: 0.0})])
def test_without_a_loss_or_a_difference_nothing_changes(measured: float, saved: dict[int | str, float]) -> None:
    assert corrected(scores(), plan(), Marginals(measured, saved)) == scores()


def test_where_parts_are_fewer_they_are_charged_and_formats_are_not() -> None:
    """Layer 0 is narrower as well as rounded, layer 1 only rounded; both lose 0.05 more than predicted."""
    columns = {name: Column(name, (1.0,) * LAYERS, "nats/token", "high", "") for name in (
        "response:q", "response:drop", "response:floor", "output-error:q:4/64", "output-error:q:probe",
        "output-error:down:width 0.5", "output-error:q:rank 0.5")}
    edits = (Edit(0, "quantize", {"bits": 4}, 0.02), Edit(0, "narrow", {"width": 8}, 0.01),
             Edit(1, "quantize", {"bits": 4}, 0.02))
    found = corrected(Scores(random_stack(LAYERS).spec, columns), Plan("t", LAYERS, edits),
                      Marginals(0.15, {0: 0.08, 1: 0.07}))
    values = {name: column.values for name, column in found.columns.items()}
    assert values["response:q"] == pytest.approx((1.0, 3.5, 1.0, 1.0))
    assert values["output-error:down:width 0.5"] == pytest.approx((4.0, 1 / 3.5, 1.0, 1.0))  # 6, but bounded
    assert values["output-error:q:rank 0.5"] == pytest.approx((1.0, 1 / 3.5, 1.0, 1.0))
    for name in ("response:drop", "response:floor", "output-error:q:4/64", "output-error:q:probe"):
        assert values[name] == (1.0,) * LAYERS
