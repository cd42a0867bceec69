"""The whole job on a tiny model: its promises, and a kill at any moment."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from layerwise.allocate.plan import Plan
from layerwise.report.report import Report
from layerwise.report.tried import load_tried
from layerwise.stack.open import open

CODE = "from layerwise.cli import main; main()"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
FILES = {"run.json", "scores.parquet", "plan.json", "model", "report.html", "log.txt"}


@pytest.fixture(scope="module")
def done(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A finished run and the object it printed."""
    folder = tmp_path_factory.mktemp("optimize")
    arguments = ["optimize", str(model), "--bytes", "55%", "--controls", "-o", "run", "--json"]
    ran = subprocess.run(
        [sys.executable, "-c", CODE, *arguments], capture_output=True, text=True, cwd=folder, env=ENVIRONMENT
    )
    assert ran.returncode == 0, ran.stderr
    return folder, json.loads(ran.stdout.splitlines()[-1])


def test_the_object_has_both_sides_and_places(done: tuple[Path, dict[str, Any]]) -> None:
    folder, found = done
    assert {"before", "after", "plan", "report"} <= set(found)
    assert (folder / found["plan"]).is_file() and (folder / found["report"]).is_file()
    assert found["after"]["bytes"] <= 0.55 * found["before"]["bytes"]
    low, high = found["after"]["perplexity_interval"]
    assert low < found["after"]["perplexity"] < high


def test_the_run_holds_everything(done: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = done
    assert {path.name for path in (folder / "run").iterdir()} >= FILES


def test_the_saved_model_is_the_planned_one(done: tuple[Path, dict[str, Any]], model: Path) -> None:
    folder, found = done
    slim, plan = open(folder / "run" / "model"), Plan.load(folder / found["plan"])
    assert slim.spec == plan.edited(open(model).spec)
    assert slim.spec.bytes() == found["after"]["bytes"] == plan.predicted["bytes"]


def test_verification_text_had_no_part_in_measuring(done: tuple[Path, dict[str, Any]]) -> None:
    report = Report.load(done[0] / "run" / "report.json")
    assert report.provenance["data"]["split"] == "verification" and report.notes == ()


@pytest.mark.slow
def test_half_the_cache(model: Path, tmp_path: Path) -> None:
    arguments = ["optimize", str(model), "--cache", "50%", "--only", "share", "-o", "run", "--json"]
    ran = subprocess.run(
        [sys.executable, "-c", CODE, *arguments], capture_output=True, text=True, cwd=tmp_path, env=ENVIRONMENT
    )
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout.splitlines()[-1])
    assert found["after"]["cache_bytes"] == found["before"]["cache_bytes"] / 2
    slim = open(tmp_path / "run" / "model")
    assert len(slim.spec.sources) == 2 and slim.spec.cache_bytes() == found["after"]["cache_bytes"]


def test_controls_were_tried(done: tuple[Path, dict[str, Any]]) -> None:
    tried = load_tried(done[0] / "run" / "tried.json")
    assert [point.kind for point in tried].count("plan") == 1
    assert {point.name for point in tried if point.kind == "control"} >= {"shuffled", "reversed"}


def test_finished_it_prints_the_same_again_at_once(done: tuple[Path, dict[str, Any]], model: Path) -> None:
    arguments = ["optimize", str(model), "--bytes", "55%", "--controls", "-o", "run", "--json"]
    ran = subprocess.run(
        [sys.executable, "-c", CODE, *arguments], capture_output=True, text=True, cwd=done[0], env=ENVIRONMENT
    )
    assert json.loads(ran.stdout) == done[1]
    assert "measuring" not in ran.stderr


def test_killed_at_random_moments_it_makes_the_same_plan(
    done: tuple[Path, dict[str, Any]], model: Path, tmp_path: Path
) -> None:
    arguments = ["optimize", str(model), "--bytes", "55%", "--controls", "-o", "run", "--json"]
    command = [sys.executable, "-c", CODE, *arguments]
    chance = random.Random(0)
    for _ in range(3):
        process = subprocess.Popen(
            command, cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        time.sleep(chance.uniform(1.0, 9.0))
        process.send_signal(signal.SIGKILL)
        process.wait()
    ran = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    for name in ("plan.json", "model/model.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (done[0] / "run" / name).read_bytes()
    names = {path.name for path in (tmp_path / "run").iterdir() if path.name != ".lock"}
    assert not [name for name in names if name.startswith(".")]


def _interruptible() -> None:
    """A shell's background job starts with interrupts ignored, and its children inherit that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_an_interrupt_ends_with_130_and_the_run_goes_on(model: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", CODE, "optimize", str(model), "--bytes", "60%", "-o", "run"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, cwd=tmp_path, env=ENVIRONMENT, preexec_fn=_interruptible, **pipes)
    assert process.stderr is not None
    process.stderr.readline()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130
    assert b"Traceback" not in errors and b"the same command goes on from here" in errors


@pytest.mark.real
@pytest.mark.slow
def test_the_demo_keeps_its_promises(tmp_path: Path) -> None:
    command = [sys.executable, "-c", CODE, "optimize", "smollm2", "--bytes", "55%", "--controls", "-o", "run", "--json"]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=ENVIRONMENT)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout.splitlines()[-1])
    before, after = found["before"], found["after"]
    assert after["bytes"] <= 0.55 * before["bytes"]
    assert after["perplexity"] <= 1.01 * before["perplexity"]
    assert after["decode_tokens_per_s"] > before["decode_tokens_per_s"]
    assert after["peak_memory_bytes"] < before["peak_memory_bytes"]
    assert open(tmp_path / "run" / "model").spec.bytes() == after["bytes"]
