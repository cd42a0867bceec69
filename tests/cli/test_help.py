"""Help is fast because nothing heavy is imported, and every command has it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Command = Callable[..., Any]

ROOT = Path(__file__).parents[2]
COMMANDS = ["profile", "optimize", "pareto", "apply", "export", "compare", "generate", "chat", "serve", "batch",
            "systems", "reproduce", "doctor"]
HEAVY = ["torch", "transformers", "numpy", "pandas", "scipy", "plotly", "rich", "tokenizers", "jinja2"]


def test_help_imports_nothing_heavy() -> None:
    code = f"""
import sys
from layerwise.cli import main
try:
    main(["--help"])
except SystemExit as end:
    assert end.code == 0
print([name for name in {HEAVY} if name in sys.modules])
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_help_takes_half_a_second_of_processor_time_at_most() -> None:
    code = "from layerwise.cli import main; main(['--help'])"
    before = os.times()
    subprocess.run(
        [sys.executable, "-c", code], capture_output=True, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    after = os.times()
    spent = after.children_user + after.children_system - before.children_user - before.children_system
    assert spent <= 0.5, f"{spent:.2f} s, at {time.ctime()}"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(layerwise: Command, command: str) -> None:
    text = layerwise(command, "--help").stdout
    assert "--json" in text and text.startswith(f"Usage: layerwise {command} ")


def test_the_commands_are_the_promised_ones(layerwise: Command) -> None:
    text = layerwise("--help").stdout
    assert [line.split()[0] for line in text.partition("Commands:")[2].strip().splitlines()] == COMMANDS


def test_no_arguments_show_help(layerwise: Command) -> None:
    assert "Usage: layerwise" in layerwise(check=False).stderr


def test_the_version(layerwise: Command) -> None:
    import layerwise as lw

    assert layerwise("--version").stdout == f"layerwise {lw.__version__}\n"


def test_completion_offers_models_solvers_and_systems() -> None:
    from layerwise.cli.generate import generate
    from layerwise.cli.optimize import solvers
    from layerwise.cli.options import demo_names
    from layerwise.cli.profile import instruments
    from layerwise.cli.reproduce import done_systems
    from layerwise.io.demos import DEMOS

    assert generate and set(demo_names()) == {*DEMOS, "tiny-vlm"}
    assert "milp" in solvers() and "block-influence" in instruments() and "effective-depth" in done_systems()
