"""A run resumes, refuses what does not belong to it, and survives a kill at any moment."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from layerwise.errors import BadBudget, BadFile, BadOption
from layerwise.io import atomic
from layerwise.report.run import Run, default_folder

ARGUMENTS = {"model": "tiny", "bytes": "55%", "seed": 0}


def save(value: Any, path: Path) -> None:
    atomic.write_text(path, json.dumps(value))


def load(path: Path) -> Any:
    return json.loads(path.read_text())


def step(run: Run, name: str, produce: Callable[[], Any]) -> Any:
    return run.step(name, produce, file=f"{name}.json", save=save, load=load)


def never() -> Any:
    raise AssertionError("a finished step was run again")


def test_a_finished_step_is_read_and_not_run_again(tmp_path: Path) -> None:
    with Run.open(tmp_path / "run", "optimize", ARGUMENTS) as run:
        assert step(run, "scores", lambda: (1, 2)) == [1, 2], "the value must be the one in the file"
    with Run.open(tmp_path / "run", "optimize", ARGUMENTS) as run:
        assert step(run, "scores", never) == [1, 2]
        assert list(run.finished) == ["scores"]


def test_an_interrupted_step_is_run_again(tmp_path: Path) -> None:
    def fail() -> Any:
        raise KeyboardInterrupt

    with Run.open(tmp_path, "optimize", ARGUMENTS) as run:
        step(run, "scores", lambda: 1)
    with pytest.raises(KeyboardInterrupt), Run.open(tmp_path, "optimize", ARGUMENTS) as run:
        step(run, "plan", fail)
    with Run.open(tmp_path, "optimize", ARGUMENTS) as run:
        assert step(run, "scores", never) == 1
        assert step(run, "plan", lambda: 2) == 2
    assert "stopped: KeyboardInterrupt" in (tmp_path / "log.txt").read_text()


def test_a_step_whose_file_is_gone_is_redone_with_all_that_follow(tmp_path: Path) -> None:
    with Run.open(tmp_path, "optimize", ARGUMENTS) as run:
        step(run, "scores", lambda: 1)
        step(run, "plan", lambda: 2)
    (tmp_path / "scores.json").unlink()
    with Run.open(tmp_path, "optimize", ARGUMENTS) as run:
        assert step(run, "scores", lambda: 3) == 3
        assert step(run, "plan", lambda: 4) == 4


@pytest.mark.parametrize(
    ("command", "arguments", "said"),
    [
        ("optimize", {**ARGUMENTS, "bytes": "40%"}, "bytes = '40%'"),
        ("optimize", {"model": "tiny", "bytes": "55%"}, "seed = None"),
        ("profile", ARGUMENTS, "the command 'profile'"),
    ],
)
def test_other_arguments_are_refused_by_name(
    tmp_path: Path, command: str, arguments: dict[str, Any], said: str
) -> None:
    Run.open(tmp_path, "optimize", ARGUMENTS).close()
    with pytest.raises(BadOption) as error:
        Run.open(tmp_path, command, arguments)
    assert said in error.value.given and "--fresh" in error.value.do and "-o" in error.value.do


def test_another_version_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Run.open(tmp_path, "optimize", ARGUMENTS).close()
    monkeypatch.setattr("layerwise.report.run.versions", lambda: {"torch": "9.9"})
    with pytest.raises(BadOption, match="version"):
        Run.open(tmp_path, "optimize", ARGUMENTS)


def test_fresh_begins_anew_and_removes_only_its_own_files(tmp_path: Path) -> None:
    with Run.open(tmp_path, "optimize", ARGUMENTS) as run:
        step(run, "scores", lambda: 1)
    (tmp_path / "notes.txt").write_text("mine")
    with Run.open(tmp_path, "optimize", {**ARGUMENTS, "bytes": "40%"}, fresh=True) as run:
        assert run.finished == {}
        assert step(run, "scores", lambda: 2) == 2
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("fresh", [False, True])
def test_a_folder_with_other_things_is_refused(tmp_path: Path, fresh: bool) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(BadFile, match=r"thesis\.tex"):
        Run.open(tmp_path, "optimize", ARGUMENTS, fresh=fresh)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(BadFile, match="is a file"):
        Run.open(tmp_path / "run", "optimize", ARGUMENTS)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": "something else"}'])
def test_a_damaged_record_is_one_clear_error_and_fresh_repairs_it(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(BadFile, match=r"run\.json cannot be read"):
        Run.open(tmp_path, "optimize", ARGUMENTS)
    Run.open(tmp_path, "optimize", ARGUMENTS, fresh=True).close()


def test_two_processes_cannot_share_a_folder(tmp_path: Path) -> None:
    code = "import sys; from layerwise.report.run import Run; Run.open(sys.argv[1], 'optimize', {'a': 1})"
    with Run.open(tmp_path, "optimize", {"a": 1}):
        other = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
        assert "another process is working" in other.stderr
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)]).returncode == 0


def test_a_run_that_is_refused_at_once_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(BadBudget), Run.open(tmp_path / "run", "optimize", ARGUMENTS):
        raise BadBudget("1 %", expected="more", do="ask for more")
    assert not (tmp_path / "run").exists()
    with pytest.raises(BadBudget), Run.open(tmp_path / "run", "optimize", ARGUMENTS) as run:
        step(run, "scores", lambda: 1)
        raise BadBudget("1 %", expected="more", do="ask for more")
    assert (tmp_path / "run" / "scores.json").exists()


def test_a_noted_fact_must_stay_the_same(tmp_path: Path) -> None:
    with Run.open(tmp_path, "optimize", ARGUMENTS) as run:
        run.note("model fingerprint", "abc")
    with Run.open(tmp_path, "optimize", ARGUMENTS) as run:
        run.note("model fingerprint", "abc")
        with pytest.raises(BadOption, match="model fingerprint 'xyz'"):
            run.note("model fingerprint", "xyz")


def test_the_default_folder_follows_the_arguments() -> None:
    one = default_folder("optimize", "models/smollm2", ARGUMENTS)
    assert one == default_folder("optimize", "models/smollm2", dict(reversed(ARGUMENTS.items())))
    assert one != default_folder("optimize", "models/smollm2", {**ARGUMENTS, "seed": 1})
    assert one.parts[0] == "runs" and one.name.startswith("optimize-smollm2-")


STEPS = """
import random, sys, time
from pathlib import Path
from layerwise.io import atomic
from layerwise.report.run import Run
def save(value, path):
    atomic.write_text(path, value)
with Run.open(sys.argv[1], "optimize", {"seed": 0}) as run:
    total = 0
    for name in "abcdefgh":
        def produce(name=name):
            time.sleep(0.02)
            return str(total * 31 + ord(name))
        total = int(run.step(name, produce, file=name, save=save, load=Path.read_text))
    print(total)
"""


def test_killed_at_random_moments_it_ends_with_the_same_result(tmp_path: Path) -> None:
    command = [sys.executable, "-c", STEPS]
    wanted = subprocess.run([*command, str(tmp_path / "whole")], capture_output=True, text=True, check=True).stdout
    chance = random.Random(0)
    for _ in range(4):
        process = subprocess.Popen([*command, str(tmp_path / "killed")], stdout=subprocess.DEVNULL)
        time.sleep(chance.uniform(0.05, 0.35))
        process.send_signal(signal.SIGKILL)
        process.wait()
    again = subprocess.run([*command, str(tmp_path / "killed")], capture_output=True, text=True, check=True)
    assert again.stdout == wanted
