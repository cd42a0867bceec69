"""What the documentation points at exists, and what it says about the code is still so."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import layerwise as lw

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
IDS = [str(page.relative_to(ROOT)) for page in PAGES]


def python(page: Path) -> list[str]:
    """The Python blocks of a page."""
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) < 150


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        assert "://" in target or (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_named_files_exist(page: Path) -> None:
    for place in re.findall(r"`((?:layerwise|tests|benchmarks|docs)/[\w./-]+)`", page.read_text()):
        assert (ROOT / place).exists(), place


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_line_counts_are_still_about_right(page: Path) -> None:
    for place, lines in re.findall(r"`([\w./-]+\.py)` \(about (\d+) lines\)", page.read_text()):
        real = len((ROOT / place).read_text().splitlines())
        assert abs(real - int(lines)) <= max(5, 0.2 * real), f"{place} has {real} lines"


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_examples_parse_and_use_public_names(page: Path) -> None:
    for block in python(page):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "lw":
                assert node.attr in lw.__all__, node.attr


@pytest.mark.real
@pytest.mark.slow
def test_the_engine_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    block = next(block for block in python(ROOT / "docs/serve.md") if "lw.Engine" in block)
    exec(block, {})
    said = capsys.readouterr().out
    assert "Paris" in said.splitlines()[0] and len(said) > 60


@pytest.mark.real
@pytest.mark.slow
def test_the_readme_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    [block] = python(ROOT / "README.md")
    names: dict[str, object] = {}
    exec(block, names)
    assert (tmp_path / "slim" / "config.json").exists()
