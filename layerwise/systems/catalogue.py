"""The list of all published systems with their state."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Literal

from layerwise.systems import SYSTEMS


@dataclass(frozen=True)
class Entry:
    """One paper. `state` is "done" where `layerwise reproduce <id>` runs, otherwise "planned"."""

    id: str
    title: str
    year: int
    family: str
    state: Literal["done", "planned"]
    arxiv: str | None = None


@cache
def catalogue() -> dict[str, Entry]:
    """Every system by id, in the order of the families."""
    tables = tomllib.loads(files("layerwise.systems").joinpath("catalogue.toml").read_text(encoding="utf-8"))
    return {
        name: Entry(id=name, state="done" if name in SYSTEMS else "planned", **entry)
        for name, entry in tables.items()
    }
