"""What a user sees when something is wrong: three lines, no traceback, a status that tells."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from layerwise.cli import _take_debug, main
from layerwise.errors import BadFile

Command = Callable[..., Any]


def complaint(stderr: str) -> list[str]:
    """The last three lines, which must be the three parts."""
    lines = stderr.strip().splitlines()[-3:]
    assert lines[0].startswith("error: "), stderr
    assert lines[1].startswith("  expected: ") and lines[2].startswith("  do: "), stderr
    assert "Traceback" not in stderr
    return lines


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["optimize", "smollm3", "--bytes", "55%"], "smollm3"),
        (["optimize", "MODEL"], "a budget without a limit"),
        (["optimize", "MODEL", "--bytes", "lots"], "bytes='lots'"),
        (["optimize", "MODEL", "--bytes", "1%"], "a budget of"),
        (["optimize", "MODEL", "--bytes", "55%", "--solver", "magic"], "no solver is called 'magic'"),
        (["optimize", "MODEL", "--bytes", "55%", "--only", "7"], "--only 7"),
        (["optimize", "MODEL", "--bytes", "55%", "--data", "nothing.txt"], "nothing.txt"),
        (["profile", "MODEL", "--only", "block-influense"], "block-influense"),
        (["apply", "MODEL", "missing.json", "-o", "out"], "missing.json"),
        (["generate", "MODEL", ""], "empty prompt"),
        (["generate", "MODEL", "hello", "--temperature", "-1"], "temperature=-1.0"),
        (["compare", "MODEL", "nowhere"], "nowhere"),
        (["reproduce", "nonsense"], "nonsense"),
        (["reproduce", "effective-depth", "--size", "huge"], "huge"),
        (["systems", "--family", "cooking"], "cooking"),
        (["doctor", "nowhere", "--json"], "nowhere"),
    ],
    ids=lambda value: "-".join(value[:4]) if isinstance(value, list) else None,
)
def test_wrong_input_is_three_lines_and_status_2(
    layerwise: Command, model: Path, tmp_path: Path, arguments: list[str], said: str
) -> None:
    done = layerwise(*[str(model) if word == "MODEL" else word for word in arguments], check=False)
    assert done.returncode == 2, done.stderr
    assert said in complaint(done.stderr)[0]
    assert done.stdout == ""
    assert not (tmp_path / "out").exists()


def test_usage_errors_name_the_option(layerwise: Command) -> None:
    done = layerwise("optimize", "smollm2", "--bites", "55%", check=False)
    assert done.returncode == 2 and "--bites" in done.stderr and "--bytes" in done.stderr


def test_a_damaged_checkpoint_is_named(layerwise: Command, model: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(model, tmp_path / "broken"))
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    lines = complaint(layerwise("doctor", broken, check=False).stderr)
    assert "model.safetensors" in lines[0]


def test_nan_weights_are_found(layerwise: Command, model: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    broken = Path(shutil.copytree(model, tmp_path / "broken"))
    (broken / "layerwise.json").unlink()
    tensors = load_file(broken / "model.safetensors")
    name = next(name for name in tensors if ".2." in name)
    tensors[name].view(-1)[0] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    for command in (["doctor", broken], ["optimize", broken, "--bytes", "60%"]):
        lines = complaint(layerwise(*command, check=False).stderr)
        assert "NaN" in lines[0] and "layers.2." in lines[0]
    assert not list(tmp_path.glob("runs/*/plan.json"))


def test_a_plan_for_another_model_is_refused(layerwise: Command, model: Path, tmp_path: Path) -> None:
    from layerwise.allocate.plan import Edit, Plan

    Plan("0" * 16, 4, (Edit(1, "drop", {"part": "layer"}),)).save(tmp_path / "plan.json")
    done = layerwise("apply", model, "plan.json", "-o", "out", check=False)
    assert done.returncode == 2 and "a plan for the model with table 0000" in complaint(done.stderr)[0]
    assert not (tmp_path / "out").exists()


def test_other_arguments_for_the_same_run_are_refused(layerwise: Command, model: Path, tmp_path: Path) -> None:
    layerwise("profile", model, "--only", "weight-l2", "-o", "run")
    lines = complaint(layerwise("profile", model, "--only", "weight-l1", "-o", "run", check=False).stderr)
    assert "instruments = ['weight-l1']" in lines[0] and "--fresh" in lines[2]
    layerwise("profile", model, "--only", "weight-l1", "-o", "run", "--fresh")


def test_an_impossible_budget_names_the_smallest_and_leaves_nothing(
    layerwise: Command, model: Path, tmp_path: Path
) -> None:
    done = layerwise("optimize", model, "--bytes", "1%", check=False)
    assert "at least 7,324 bytes" in complaint(done.stderr)[1]
    assert "measuring" not in done.stderr
    assert not list(tmp_path.glob("runs/*"))


def test_debug_shows_the_traceback() -> None:
    with pytest.raises(BadFile, match="nowhere"):
        main(["doctor", "nowhere", "--debug"])


def test_debug_after_two_dashes_belongs_to_the_prompt() -> None:
    assert _take_debug(["generate", "m", "--debug", "x"]) == (True, ["generate", "m", "x"])
    assert _take_debug(["generate", "m", "--", "--debug"]) == (False, ["generate", "m", "--", "--debug"])


def test_json_leaves_standard_output_empty_on_errors(layerwise: Command) -> None:
    done = layerwise("doctor", "nowhere", "--json", check=False)
    assert done.returncode == 2 and done.stdout == ""


def test_what_nobody_foresaw_is_three_lines_and_status_1(layerwise: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise ZeroDivisionError("division by zero\nsomewhere")

    monkeypatch.setattr("layerwise.systems.catalogue.catalogue", fail)
    done = layerwise("systems", check=False)
    assert done.returncode == 1
    lines = complaint(done.stderr)
    assert lines[0] == "error: ZeroDivisionError: division by zero somewhere" and "--debug" in lines[2]
