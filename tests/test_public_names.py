"""The public namespace is exactly what is written here."""

from __future__ import annotations

import inspect
import subprocess
import sys
import tomllib
from importlib.metadata import version
from itertools import chain
from pathlib import Path

import pytest

import layerwise as lw

ROOT = Path(__file__).parents[1]
PUBLIC = {
    "AsyncEngine", "Budget", "Choice", "Engine", "LayerSpec", "LayerwiseError", "Params", "Plan", "Report", "Run",
    "Scores", "Stack", "StackSpec", "State", "__version__", "allocate", "apply", "errors", "layer_table", "measure",
    "open", "testing", "undo", "verify",
}  # fmt: skip


def test_the_names_are_exact() -> None:
    assert set(lw.__all__) == PUBLIC
    assert dir(lw) == sorted(PUBLIC)


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_every_name_resolves(name: str) -> None:
    assert getattr(lw, name) is not None


@pytest.mark.parametrize("name", sorted(PUBLIC - {"__version__", "errors", "testing"}))
def test_every_class_and_function_is_documented(name: str) -> None:
    assert inspect.getdoc(getattr(lw, name))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'optimise'"):
        lw.optimise  # type: ignore[attr-defined]  # noqa: B018


@pytest.mark.parametrize("verb", ["measure", "allocate"])
@pytest.mark.parametrize("first", ["", "import layerwise.{verb}", "from layerwise.{verb} import *"])
def test_a_verb_that_is_also_a_folder_can_be_called(verb: str, first: str) -> None:
    place = {"measure": "engine", "allocate": "solve"}[verb]
    code = f"""
{first.format(verb=verb)}
import inspect, sys, types
import layerwise as lw
before = inspect.signature(lw.{verb})
from layerwise.{verb}.{place} import {verb}
assert inspect.signature(lw.{verb}) == before == inspect.signature({verb})
assert isinstance(lw.{verb}, types.ModuleType) and callable(lw.{verb})
assert lw.{verb} is sys.modules["layerwise.{verb}"]
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_version_is_the_installed_one() -> None:
    assert version("layerwise") == lw.__version__


def test_every_dependency_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + list(chain(*project["optional-dependencies"].values()))
    pinned = {
        line.split("==")[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    assert {name.split(">=")[0].lower() for name in wanted} <= pinned
