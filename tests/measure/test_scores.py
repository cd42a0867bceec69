"""Scores: columns beside the table, their ranking, their files and their views."""

import dataclasses
import json
import math
from pathlib import Path

import pytest

from layerwise.errors import BadData, BadFile, BadOption, UnknownName
from layerwise.measure.scores import Column, Scores
from layerwise.spec import Attention, FeedForward, LayerSpec, StackSpec

NAN = math.nan


def spec(layers: int = 4) -> StackSpec:
    row = LayerSpec(Attention(2, 1, 8), FeedForward(32))
    return StackSpec("llama", 16, 100, (row,) * layers)


def scores() -> Scores:
    influence = Column("block-influence", (0.5, 0.1, NAN, 0.3), "1 - cosine", "high", "how far a layer turns")
    density = Column("zd", (0.5, 0.1, 0.2, 0.3), "share", "low", "large weights", {"head": 0.7})
    size = Column("cost:bytes", (8, 8, 8, math.inf), "bytes", None, "stored size")
    columns = {column.name: column for column in (influence, density, size)}
    return Scores(spec(), columns, "abc", {"seed": 0, "data": "pydoc"})


def test_ranking_follows_direction_and_puts_the_unmeasured_last() -> None:
    assert scores().ranking("block-influence") == [1, 3, 0, 2]
    assert scores().ranking("zd") == [0, 3, 2, 1]


def test_equal_values_rank_by_depth() -> None:
    assert Column("c", (1, 1, 0.5), "", "high", "").ranking() == [2, 0, 1]
    assert Column("c", (1, 1, 2), "", "low", "").ranking() == [2, 0, 1]


def test_a_cost_ranks_nothing() -> None:
    with pytest.raises(BadOption, match="cost:bytes"):
        scores().ranking("cost:bytes")


def test_an_unknown_column_names_near_ones() -> None:
    with pytest.raises(UnknownName, match="block-influence"):
        scores()["block-influense"]


def test_a_column_of_the_wrong_length_is_refused() -> None:
    with pytest.raises(BadData, match="3 values"):
        Scores(spec(4), {"c": Column("c", (1, 2, 3), "", "high", "")})


def test_frame_has_a_row_per_layer_and_a_column_per_instrument() -> None:
    frame = scores().frame
    assert frame.index.name == "layer"
    assert list(frame.columns) == ["block-influence", "zd", "cost:bytes"]
    assert frame["zd"].tolist() == [0.5, 0.1, 0.2, 0.3]


@pytest.mark.parametrize("name", ["scores.json", "scores.parquet"])
def test_files_carry_everything(name: str, tmp_path: Path) -> None:
    before = scores()
    after = Scores.load(before.save(tmp_path / name))
    assert after.spec == before.spec
    assert (after.model, after.provenance) == (before.model, before.provenance)
    for column in before.columns.values():
        same = dataclasses.replace(after[column.name], values=())
        assert same == dataclasses.replace(column, values=())
        assert after[column.name].values == pytest.approx(column.values, nan_ok=True, abs=0)


def test_parquet_is_an_ordinary_frame(tmp_path: Path) -> None:
    import pandas

    frame = pandas.read_parquet(scores().save(tmp_path / "scores.parquet"))
    assert frame["zd"].tolist() == [0.5, 0.1, 0.2, 0.3]


@pytest.mark.parametrize("damage", ["missing", "truncated", "foreign", "empty"])
@pytest.mark.parametrize("ending", [".json", ".parquet"])
def test_a_bad_file_is_named(damage: str, ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"scores{ending}"
    if damage == "truncated":
        data = scores().save(path).read_bytes()
        path.write_bytes(data[:len(data) // 2])
    elif damage == "foreign":
        scores().frame.to_parquet(path) if ending == ".parquet" else path.write_text(json.dumps({"a": 1}))
    elif damage == "empty":
        path.write_bytes(b"")
    with pytest.raises(BadFile, match="scores"):
        Scores.load(path)


def test_another_ending_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadOption, match="csv"):
        scores().save(tmp_path / "scores.csv")
    assert not list(tmp_path.iterdir())


def test_merge_joins_columns_and_keeps_both_provenances() -> None:
    extra = Scores(spec(), {"lim": Column("lim", (1, 2, 3, 4), "", "high", "")}, "", {"seed": 1})
    both = scores().merge(extra)
    assert list(both.columns) == ["block-influence", "zd", "cost:bytes", "lim"]
    assert both.model == "abc"
    assert both.provenance == {"merged": [{"seed": 0, "data": "pydoc"}, {"seed": 1}]}
    assert len(both.merge(Scores(spec(), {}, "", {"seed": 2})).provenance["merged"]) == 3


def test_merge_refuses_another_model() -> None:
    with pytest.raises(BadData, match="two different models"):
        scores().merge(Scores(spec(), {}, "other weights"))
    with pytest.raises(BadData, match="two different models"):
        scores().merge(Scores(spec(5), {}))


def test_text_shows_units_directions_and_what_is_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    lines = str(scores()).splitlines()
    assert lines[0].split() == ["layer", "block-influence", "zd", "cost:bytes"]
    assert "high matters" in lines[2]
    assert lines[3].split() == ["0", "0.5", "0.5", "8"]
    assert lines[7].split() == ["head", "0.7"]
    assert len({len(line) for line in lines[:2]}) == 1


def test_text_folds_to_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    text = str(scores())
    assert max(len(line) for line in text.splitlines()) <= 40
    assert text.count("layer") == 2


def test_html_and_plot_show_every_column() -> None:
    assert "zd [share]" in scores()._repr_html_()
    assert len(scores().plot().data) == 3
    assert len(scores().plot("zd").data) == 1
