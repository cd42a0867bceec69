"""Every command on a tiny model, as a user calls it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from layerwise.allocate.plan import Edit, Plan
from layerwise.measure.scores import Scores
from layerwise.stack.open import open

Command = Callable[..., Any]

SIDE = {
    "bytes", "parameters", "decode_tokens_per_s", "prefill_tokens_per_s", "peak_memory_bytes", "perplexity",
    "perplexity_interval",
}  # fmt: skip


def last(done: Any) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return value


@pytest.fixture(scope="module")
def plan(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    edits = (Edit(0, "quantize", {"bits": 8}), Edit(2, "drop", {"part": "layer"}))
    return Plan(open(model).spec.fingerprint(), 4, edits).save(tmp_path_factory.mktemp("plan") / "plan.json")


def test_profile_saves_what_it_measures(layerwise: Command, model: Path, tmp_path: Path) -> None:
    done = layerwise("profile", model, "--only", "block-influence, weight-l2", "-o", "run", "--json")
    found = last(done)
    assert done.stdout.count("\n") == 1
    assert set(found["columns"]) >= {"block-influence", "weight-l2"} and found["layers"] == 4
    scores = Scores.load(tmp_path / found["scores"])
    assert list(scores["block-influence"].values) == found["columns"]["block-influence"]["values"]


def test_profile_shows_a_table_and_resumes(layerwise: Command, model: Path, tmp_path: Path) -> None:
    first = layerwise("profile", model, "--only", "block-influence")
    assert "block-influence" in first.stdout and "4 layers" in first.stderr
    again = layerwise("profile", model, "--only", "block-influence")
    assert again.stdout == first.stdout
    (run,) = (tmp_path / "runs").iterdir()
    assert "scores: already finished" in (run / "log.txt").read_text()


def test_apply_saves_the_planned_model(layerwise: Command, model: Path, plan: Path, tmp_path: Path) -> None:
    done = layerwise("apply", model, plan, "-o", "slim", "--json")
    slim = open(tmp_path / "slim")
    assert last(done)["layers"] == len(slim) == 3
    assert last(done)["bytes"] == slim.spec.bytes()
    assert slim.tokenizer is not None and slim.tokenizer.encode("ab")


def test_apply_says_what_each_layer_got(layerwise: Command, model: Path, plan: Path) -> None:
    text = layerwise("apply", model, plan, "-o", "slim").stdout
    assert "8 bits" in text and "dropped" in text


def test_compare_tables_and_plans(layerwise: Command, model: Path, plan: Path, tmp_path: Path) -> None:
    layerwise("apply", model, plan, "-o", "slim")
    found = last(layerwise("compare", model, "slim", "--tables-only", "--json"))
    assert found["differences"] == ["rows: 4 entries -> 3 entries"]
    assert found["before"]["bytes"] > found["after"]["bytes"]
    Plan.load(plan).with_edits(Edit(0, "quantize", {"bits": 4})).save(tmp_path / "other.json")
    text = layerwise("compare", plan, "other.json").stdout
    assert "layer 0" in text and "bits=4" in text


def test_compare_runs_both_models(layerwise: Command, model: Path) -> None:
    found = last(layerwise("compare", model, model, "--json"))
    assert set(found["before"]) >= SIDE and found["agreement"] == 1.0


def test_generate_streams_text(layerwise: Command, model: Path) -> None:
    text = layerwise("generate", model, "hello", "-n", "12").stdout
    found = last(layerwise("generate", model, "hello", "-n", "12", "--json"))
    assert text == found["text"] + "\n"
    assert 0 < len(found["tokens"]) <= 12 and found["tokens_per_s"] > 0


def test_systems_lists_all_of_them(layerwise: Command) -> None:
    found = last(layerwise("systems", "--json"))["systems"]
    assert len(found) == 105
    assert all({"id", "family", "state"} <= set(entry) for entry in found)
    done = [entry["id"] for entry in found if entry["state"] == "done"]
    assert "effective-depth" in done
    assert done[0] in layerwise("systems", "--done").stdout


def test_reproduce_ends_well_whatever_held(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from layerwise.cli import main
    from layerwise.systems import base

    def run(size: str, seed: int) -> list[base.Check]:
        return [
            base.Check("depth", "deep is better", {"deep": 1.23456789}, 2.0, False, "too small"),
            base.Check("width", "wide is better", 1.0, None, None, "not at this size"),
        ]

    monkeypatch.setattr(base, "SYSTEMS", {"effective-depth": run})
    for arguments in (["--json"], []):
        with pytest.raises(SystemExit) as end:
            main(["reproduce", "effective-depth", *arguments])
        assert end.value.code == 0
        out = capsys.readouterr().out
        if arguments:
            found = json.loads(out)
            assert (found["system"], found["size"]) == ("effective-depth", "quick")
            assert set(found["checks"][0]) == {"name", "claim", "measured", "control", "holds", "why"}
        else:
            assert "depth: does not hold" in out and "width: cannot tell" in out and "0 of 2 claims" in out


def test_doctor_reports_the_environment_and_a_model(layerwise: Command, model: Path) -> None:
    found = last(layerwise("doctor", model, "--json"))
    assert {"python", "torch", "cores", "fast bfloat16", "compiled kernels", "matrix unit",
            "disk_free_bytes"} <= set(found["environment"])
    assert found["model"]["finite logits"] and found["model"]["bytes"] == found["model"]["bytes_on_disk"]
    assert "every weight is finite" in layerwise("doctor", model).stdout
