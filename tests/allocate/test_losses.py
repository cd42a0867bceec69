"""Predicted losses: measured where tried, else importance times distortion."""

import math

import pytest

from layerwise.allocate.losses import Alternative, importance, predict
from layerwise.errors import BadOption, UnknownName
from layerwise.measure.scores import Column, Scores
from tests.allocate.tables import scores, spec

FOUR = Alternative("4 bits", "quantize", {"bits": 4}, "quantization-sensitivity:4", 4.0**-4)
DROP = Alternative("drop", "drop", {"part": "layer"}, "leave-one-out", 1.0)
KEEP = Alternative("keep")
MATRICES = ("q", "k", "v", "o", "gate", "up", "down")


def test_measured_losses_are_taken_as_they_are() -> None:
    table = scores({"quantization-sensitivity:4": [0.1, 0.2], "block-influence": [1, 1]}, {"embedding": 0.5})
    losses = predict(table, [KEEP, FOUR, DROP], None)
    assert (losses.unit, losses.columns) == ("nats/token", ("quantization-sensitivity:4",))
    assert [losses.of(FOUR, target) for target in (0, 1, "embedding")] == [0.1, 0.2, 0.5]
    assert losses.of(KEEP, 0) == 0
    assert math.isnan(losses.of(DROP, 0))
    assert math.isnan(losses.of(FOUR, "head"))


def test_a_measured_gain_counts_as_no_loss() -> None:
    losses = predict(scores({"leave-one-out": [-0.1, 0.1]}), [KEEP, DROP], None)
    assert [losses.of(DROP, layer) for layer in range(2)] == [0, 0.1]


def test_matrices_measured_one_by_one_add_up() -> None:
    table = scores({f"quantization-sensitivity:{m}:4": [0.01, 0.02] for m in MATRICES}, {"embedding": 0.5})
    losses = predict(table, [FOUR], None)
    assert losses.of(FOUR, 1) == pytest.approx(0.14)
    assert math.isnan(losses.of(FOUR, "embedding"))


def test_a_missing_matrix_makes_the_loss_unknown() -> None:
    table = scores({f"quantization-sensitivity:{m}:4": [0.01, 0.02] for m in MATRICES[1:]})
    assert math.isnan(predict(table, [FOUR], None).of(FOUR, 0))


def test_one_proportional_column_keeps_its_proportions() -> None:
    losses = predict(scores({"block-influence": [0.1, 0.4, math.nan]}), [KEEP, FOUR, DROP], None)
    assert losses.unit == "relative"
    assert [losses.of(DROP, layer) for layer in range(3)] == [0.25, 1, 1]
    assert losses.of(FOUR, 0) == 0.25 * 4.0**-4
    assert losses.of(FOUR, "embedding") == 4.0**-4


def test_several_columns_combine_by_mean_rank() -> None:
    table = scores({"a": [1, 2, 3, 4], "b": [40, 30, 20, 10]})
    losses = predict(table, [DROP], None)
    assert [losses.of(DROP, layer) for layer in range(4)] == [0.625] * 4


def test_ranks_for_signed_and_for_low_columns() -> None:
    assert importance(Column("lim", (-0.9, -0.1), "", "high", ""), ratio=True) == [0.5, 1]
    assert importance(Column("zd", (0.9, 0.1), "", "low", ""), ratio=True) == [0.5, 1]
    assert importance(Column("flat", (0, 0), "", "high", ""), ratio=True) == [0.5, 1]


def test_by_names_the_columns_even_where_losses_were_measured() -> None:
    table = scores({"leave-one-out": [0.1, 0.2], "block-influence": [2, 1]})
    assert predict(table, [DROP], "block-influence").of(DROP, 0) == 1
    assert predict(table, [DROP], ["leave-one-out"]).unit == "relative"


def test_scores_that_rank_nothing() -> None:
    cost = Scores(spec(2), {"cost:bytes": Column("cost:bytes", (1, 2), "bytes", None, "")})
    with pytest.raises(BadOption, match="cost:bytes"):
        predict(cost, [FOUR], None)
    with pytest.raises(BadOption, match="cost:bytes"):
        predict(cost, [FOUR], "cost:bytes")
    with pytest.raises(UnknownName, match="block-influence"):
        predict(scores({"block-influence": [1, 2]}), [FOUR], "block-influense")
