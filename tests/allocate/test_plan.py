"""Plans: editing tables, files that people can change, differences and views."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from layerwise.allocate.plan import Edit, Plan
from layerwise.errors import BadPlan
from layerwise.spec import Format, Tiers
from tests.allocate.tables import ROW, spec

MODEL = spec(4, tied=False)
EDITS = (
    Edit(0, "quantize", {"bits": 4, "group": 32}, 0.25),
    Edit(1, "quantize", {"bits": 4, "group": 32}, 0.5),
    Edit(2, "drop", {"part": "layer"}, 1.0),
    Edit("embedding", "quantize", {"bits": 8}, 0.125),
)


def plan(*edits: Edit) -> Plan:
    return Plan(MODEL.fingerprint(), 4, edits or EDITS, model="abc", budget={"bytes": 0.55}, solver="milp",
                predicted={"loss": 1.875, "bytes": 123_456}, loss_unit="nats/token", columns=("zd",))


def test_edits_rows_and_tables() -> None:
    edited = plan().edited(MODEL)
    four = dataclasses.replace(ROW, formats=dict.fromkeys(ROW.matrices(64), Format(4, 32)))
    assert edited.rows == (four, four, ROW)
    assert edited.embedding_format == Format(8, 0, symmetric=True)
    assert edited.head_format is None
    assert MODEL.rows == (ROW,) * 4


def test_rows_of_frequent_tokens() -> None:
    edit = Edit("embedding", "quantize", {"bits": 3, "group": 32, "symmetric": False, "frequent": "8/row=",
                                          "frequent_rows": 10})
    assert plan(edit).edited(MODEL).embedding_format == Tiers(10, Format(8, 0, True), Format(3, 32))
    assert str(edit) == "8/row=@10+3/32"
    with pytest.raises(BadPlan, match="a token table"):
        plan(dataclasses.replace(edit, target=0)).edited(MODEL)


def test_edits_of_one_layer_follow_each_other() -> None:
    edited = plan(Edit(0, "drop", {"part": "attention"}), Edit(0, "quantize", {"bits": 8})).edited(MODEL)
    assert edited.rows[0].mixer is None
    assert set(edited.rows[0].formats) == {"gate", "up", "down"}


def test_a_plan_for_another_model() -> None:
    with pytest.raises(BadPlan, match="4 layers"):
        plan().edited(spec(5, tied=False))


def test_an_edit_of_a_layer_that_is_gone() -> None:
    with pytest.raises(BadPlan, match="took away"):
        plan(Edit(2, "drop", {"part": "layer"}), Edit(2, "quantize", {"bits": 8})).edited(MODEL)


def test_an_edit_by_hand_that_names_no_format_is_shown_and_named() -> None:
    wrong = Edit(1, "quantize", {"bits": 7, "group": 32, "symmetric": False})
    assert "bits=7, group=32" in str(plan(wrong))
    with pytest.raises(BadPlan, match=r"edit 0 .* layer 1: bits=7") as error:
        plan(wrong).edited(MODEL)
    assert error.value.expected.startswith("one of (2, 3")
    assert error.value.do.startswith("remove this edit, or change it: ")


def test_a_tied_head_has_no_format_of_its_own() -> None:
    model = spec(4)
    tied = dataclasses.replace(plan(Edit("head", "quantize", {"bits": 8})), table=model.fingerprint())
    with pytest.raises(BadPlan, match="head"):
        tied.edited(model)


def test_file_round_trip(tmp_path: Path) -> None:
    before = plan(*EDITS, Edit(3, "quantize", {"bits": 8, "matrices": ("q", "k")}))
    path = before.save(tmp_path / "plan.json")
    assert Plan.load(path) == before
    lines = path.read_text().splitlines()
    assert sum('"target"' in line for line in lines) == 5


def test_a_plan_without_edits(tmp_path: Path) -> None:
    empty = dataclasses.replace(plan(), edits=())
    assert Plan.load(empty.save(tmp_path / "plan.json")) == empty
    assert empty.edited(MODEL) == MODEL


def test_a_person_can_change_the_file(tmp_path: Path) -> None:
    path = plan().save(tmp_path / "plan.json")
    path.write_text(path.read_text().replace('"bits": 4', '"bits": 6', 1))
    assert Plan.load(path).diff(plan()) == ["layer 0: quantize bits=6, group=32 -> quantize bits=4, group=32"]


def damaged(**changes: Any) -> dict[str, Any]:
    return plan().to_json() | changes


@pytest.mark.parametrize(("value", "reason"), [
    ([], "not a plan"),
    ({"format": "something else"}, "not a plan"),
    (damaged(extra=1), "extra"),
    ({"format": "layerwise-plan-1"}, "edits"),
    (damaged(layers="four"), "four"),
    (damaged(edits=[{"target": 0}]), "transform"),
    (damaged(edits=3), "not iterable"),
    (damaged(edits=[{"target": 9, "transform": "drop"}]), "edit 0"),
    (damaged(edits=[{"target": "norm", "transform": "drop"}]), "norm"),
    (damaged(edits=[{"target": 0, "transform": "quantise"}]), "quantize"),
    (damaged(edits=[{"target": 0, "transform": "quantize", "arguments": {"bits": 7}}]), "bits=7"),
    (damaged(edits=[{"target": 0, "transform": "quantize", "arguments": {"bit": 8}}]), "bit"),
    (damaged(edits=[{"target": 0, "transform": "quantize", "arguments": 8}]), "int"),
])
def test_bad_plans(value: Any, reason: str, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(json.dumps(value))
    with pytest.raises(BadPlan, match=reason):
        Plan.load(tmp_path / "plan.json")


def test_unreadable_files(tmp_path: Path) -> None:
    path = plan().save(tmp_path / "plan.json")
    path.write_text(path.read_text()[:100])
    with pytest.raises(BadPlan, match=r"plan\.json"):
        Plan.load(path)
    with pytest.raises(BadPlan, match="missing"):
        Plan.load(tmp_path / "missing.json")


def test_diff_names_targets_and_settings() -> None:
    other = dataclasses.replace(plan(EDITS[0], EDITS[2], Edit(3, "drop", {"part": "attention"})), seed=1)
    assert plan().diff(plan()) == []
    assert plan().diff(other) == [
        "seed: 0 -> 1",
        "layer 1: quantize bits=4, group=32 -> keep",
        "layer 3: keep -> drop part=attention",
        "embedding: quantize bits=8 -> keep",
    ]


def test_text_merges_equal_neighbours() -> None:
    lines = str(plan()).splitlines()
    assert lines[0] == "plan for 4 layers: bytes 0.55 (milp)"
    assert [line.split()[0] for line in lines[1:]] == ["0-1", "2", "3", "embedding", "total:"]
    assert lines[1].split() == ["0-1", "quantize", "bits=4,", "group=32", "0.75"]
    assert plan().describe() == (
        "4 bits for 2 of 4 layers, drop layer for 1 of 4 layers, keep for 1 of 4 layers, "
        "8 bits for the embedding; 0.12 MB, predicted loss 1.875 nats/token")


def test_with_edits_replaces_what_a_target_had() -> None:
    changed = plan().with_edits(Edit(0, "drop", {"part": "layer"}), Edit(3, "quantize", {"bits": 8}))
    assert [edit.target for edit in changed.edits] == [1, 2, "embedding", 0, 3]
    assert changed.predicted == {}
