"""Choices: what is offered to each target, at which cost and loss."""

import math

import pytest

from layerwise.allocate.choices import dropped, keep, make_choices, quantized
from layerwise.errors import BadOption
from layerwise.measure.scores import Column, Scores
from layerwise.spec import Format, LayerSpec, Opaque, StackSpec
from tests.allocate.tables import ROW, scores, spec

BITS = ["8 bits", "6 bits", "5 bits", "4 bits", "3 bits", "2 bits"]


def labels(table: Scores, *arguments: object) -> dict[int | str, list[str]]:
    groups, _ = make_choices(table, *arguments)  # type: ignore[arg-type]
    return {group[0].target: [choice.label for choice in group] for group in groups}


def test_every_target_has_its_choices_in_order() -> None:
    offered = labels(scores({"block-influence": [1, 2]}, tied=False))
    assert list(offered) == [0, 1, "embedding", "head", "rest"]
    assert offered[0] == ["keep", *BITS, "drop"]
    assert offered["embedding"] == offered["head"] == ["keep", "8 bits", "6 bits", "4 bits"]
    assert offered["rest"] == ["keep"]


def test_dropping_is_offered_only_where_a_column_speaks_of_it() -> None:
    assert labels(scores({"zd": [1, 2]}))[0] == ["keep", *BITS]
    assert labels(scores({"zd": [1, 2], "block-influence": [1, 2]}), None, "zd")[0] == ["keep", *BITS]
    halves = {"leave-one-out": [1, 2], "leave-one-out:attention": [1, 2]}
    assert labels(scores(halves))[0] == ["keep", "drop attention", "drop"]


def test_what_was_not_measured_is_not_offered() -> None:
    offered = labels(scores({"quantization-sensitivity:8": [0.1, math.nan],
                             "quantization-sensitivity:4": [math.inf, 0.2]}))
    assert offered[0] == ["keep", "8 bits"]
    assert offered[1] == ["keep", "4 bits"]
    assert offered["embedding"] == ["keep"]


def test_rows_and_costs_come_from_the_edit() -> None:
    groups, _ = make_choices(scores({"block-influence": [1, 2]}))
    four = next(choice for choice in groups[0] if choice.label == "4 bits")
    (edit,) = four.edits
    assert (edit.transform, edit.arguments) == ("quantize", {"bits": 4, "group": 32, "symmetric": False})
    assert four.row is not None
    assert set(four.row.formats.values()) == {Format(4, 32)}
    assert four.cost["bytes"] == four.row.bytes(64, "bfloat16")
    assert groups[0][0].cost["bytes"] == ROW.bytes(64, "bfloat16")
    table = next(choice for choice in groups[2] if choice.label == "8 bits")
    assert table.cost["bytes"] == Format(8, 0, symmetric=True).bytes(96, 64)
    gone = groups[0][-1]
    assert (gone.label, gone.row, gone.cost["layers"]) == ("drop", None, 0)


def test_alternatives_can_be_chosen() -> None:
    offered = labels(scores({"block-influence": [1, 2]}), [keep(), quantized(4, method="gptq", tables=False),
                                                          dropped("attention"), dropped()])
    assert offered[0] == ["keep", "4 bits", "drop attention", "drop"]
    assert offered["embedding"] == ["keep"]


def test_an_edit_that_changes_nothing_is_not_offered_twice() -> None:
    table = scores({"block-influence": [1, 2]})
    groups, _ = make_choices(table)
    packed = spec(2).with_rows({0: groups[0][1].row})
    again = labels(Scores(packed, table.columns))
    assert again[0] == ["keep", "6 bits", "5 bits", "4 bits", "3 bits", "2 bits", "drop"]


def test_layers_of_a_module_can_only_be_dropped() -> None:
    model = StackSpec("module", 8, 0, (LayerSpec(Opaque("a.0", "B", 10, 40), None),) * 2)
    table = Scores(model, {"block-influence": Column("block-influence", (1, 2), "", "high", "")})
    assert labels(table) == {0: ["keep", "drop"], 1: ["keep", "drop"], "rest": ["keep"]}


def test_a_layer_without_a_known_choice_is_named() -> None:
    with pytest.raises(BadOption, match="layer 1"):
        make_choices(scores({"quantization-sensitivity:8": [0.1, math.nan]}), [quantized(8)])
