"""The catalogue: every id once, with what a reader needs, and a state that is true."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from layerwise.systems import SYSTEMS
from layerwise.systems.catalogue import catalogue

FAMILIES = {"measure", "transform", "train", "generate", "nets", "media", "serve", "network"}
DONE = {"effective-depth", "depth-efficiency", "reassess-layer-pruning", "layerwise-quant", "unified-layer-skipping"}


def test_it_lists_105_systems() -> None:
    assert len(catalogue()) == 105


def test_every_id_is_a_slug_and_its_entry_s_own() -> None:
    for name, entry in catalogue().items():
        assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name), name
        assert entry.id == name


def test_every_entry_names_a_paper() -> None:
    for entry in catalogue().values():
        assert entry.title and 2010 <= entry.year <= 2026, entry
        assert entry.arxiv is None or re.fullmatch(r"\d{4}\.\d{4,5}", entry.arxiv), entry
        assert entry.family in FAMILIES, entry


def test_no_paper_is_listed_twice() -> None:
    for field in ("title", "arxiv"):
        values = [value for entry in catalogue().values() if (value := getattr(entry, field)) is not None]
        assert len(values) == len(set(values)), field


def test_done_means_that_it_can_be_run() -> None:
    done = {name for name, entry in catalogue().items() if entry.state == "done"}
    assert done == set(SYSTEMS.table) >= DONE


def test_a_done_system_lives_in_the_folder_of_its_family() -> None:
    for name, place in SYSTEMS.table.items():
        assert place == f"layerwise.systems.{catalogue()[name].family}.{name.replace('-', '_')}:run"


def test_families_stand_together() -> None:
    families = [entry.family for entry in catalogue().values()]
    starts = [family for family, before in zip(families, ["", *families], strict=False) if family != before]
    assert len(starts) == len(set(starts))


def test_the_file_holds_nothing_that_is_not_shown() -> None:
    path = Path(__file__).parents[2] / "layerwise/systems/catalogue.toml"
    for name, entry in tomllib.loads(path.read_text()).items():
        assert set(entry) <= {"title", "year", "arxiv", "family"}, name
