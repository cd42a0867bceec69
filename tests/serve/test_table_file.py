"""Tables of caches from files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from layerwise.cli import main
from layerwise.errors import BadFile, BadOption
from layerwise.serve.table import layer_table
from layerwise.serve.table_file import read_table, streams
from layerwise.testing.stacks import random_stack

SPEC = random_stack(4).spec


def written(folder: Path, value: Any) -> Path:
    file = folder / "table.json"
    file.write_text(value if isinstance(value, str) else json.dumps(value))
    return file


def test_a_file_says_what_the_function_says(tmp_path: Path) -> None:
    file = written(tmp_path, {"precision": {"0-1": "int8", "3": "int4"}, "budgets": {"2-3": 9}, "scorer": "norm",
                              "skip": ["1"]})
    expected = layer_table(SPEC, precision={0: "int8", 1: "int8", 2: "int4", 3: "int4"}, budgets={2: 9, 3: 9},
                           scorer="norm", skip=[1])
    assert read_table(SPEC, file, "int4") == expected
    table = read_table(SPEC, written(tmp_path, {"residency": {"1-2": "disk", "0": "device"}}))
    assert table is not None and table.elsewhere == {1: "disk", 2: "disk"}


def test_without_a_file_all_layers_are_alike(tmp_path: Path) -> None:
    assert read_table(SPEC) is None
    assert read_table(SPEC, None, "int8") == layer_table(SPEC, precision="int8")
    assert read_table(SPEC, written(tmp_path, {})) == layer_table(SPEC)
    assert read_table(SPEC, written(tmp_path, {"precision": "int4"})) == layer_table(SPEC, precision="int4")


@pytest.mark.parametrize(("value", "said"), [
    ("{", "is no JSON"), ("[]", "holds a list"), ({"bits": 4}, "holds bits"), ({"skip": "3"}, "has a str as 'skip'"),
    ({"budgets": {"a": 3}}, "names the layers 'a'"), ({"skip": ["3-1"]}, "names the layers '3-1'"),
    ({"budgets": {"1": "9"}}, "no whole numbers"),
])  # fmt: skip
def test_what_is_no_table_is_refused(tmp_path: Path, value: Any, said: str) -> None:
    with pytest.raises(BadFile, match=said):
        read_table(SPEC, written(tmp_path, value))
    with pytest.raises(BadFile, match="cannot be read"):
        read_table(SPEC, tmp_path / "none.json")


@pytest.mark.parametrize("value", [
    {"precision": "int3"}, {"precision": {"0": "bf16"}}, {"precision": {"4": "int8"}}, {"budgets": {"0-9": 5}},
    {"skip": [99]}, {"scorer": "best"}, {"budgets": {"0": 0}}, {"residency": {"1": "moon"}},
])  # fmt: skip
def test_what_does_not_fit_the_model_is_refused(tmp_path: Path, value: Any) -> None:
    with pytest.raises(BadOption):
        read_table(SPEC, written(tmp_path, value))


def test_commands_take_both(tmp_path: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt": "abc"}\n')
    texts = []
    for options in ([], ["--cache-precision", "int8"], ["--layers", str(written(tmp_path, {"budgets": {"1-3": 8}}))],
                    ["--cache-precision", "int4"]):
        out = tmp_path / "out.jsonl"
        out.unlink(missing_ok=True)
        with pytest.raises(SystemExit) as end:
            main(["batch", str(tmp_path / "in.jsonl"), "-o", str(out), "-m", str(tiny_folder), "-n", "40", *options])
        assert not end.value.code
        texts.append(json.loads(out.read_text())["text"])
    assert len(set(texts)) > 1
    with pytest.raises(SystemExit):
        main(["chat", str(tiny_folder), "--cache-precision", "int3"])
    assert "int3" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["chat", str(tiny_folder), "--device", "cuda:99"])
    assert "--device cuda:99" in capsys.readouterr().err


def test_layers_that_wait_on_disk_change_nothing(tmp_path: Path, tiny_folder: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt": "abc"}\n')
    texts = []
    for places in ({}, {"1-2": "disk", "0": "device"}):
        out = tmp_path / f"{len(texts)}.jsonl"
        file = written(tmp_path, {"residency": places})
        with pytest.raises(SystemExit) as end:
            main(["batch", str(tmp_path / "in.jsonl"), "-o", str(out), "-m", str(tiny_folder), "--layers", str(file)])
        assert not end.value.code
        texts.append(json.loads(out.read_text())["text"])
    assert texts[0] == texts[1]
    assert streams(written(tmp_path, {"residency": {"1": "disk", "0": "device"}}))
    assert not streams(None) and not streams(written(tmp_path, {"residency": {"1": "device"}}))
