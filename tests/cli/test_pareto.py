"""`layerwise pareto` on a tiny model: a plan for every size, a page, and what cannot be reached."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from layerwise.allocate.plan import Plan
from layerwise.cli.app import app
from layerwise.stack.open import open


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, [*arguments])
    return result.exit_code, result.output if result.exception is None else f"{result.output}{result.exception}"


@pytest.fixture(scope="module")
def done(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, object]]:
    folder = tmp_path_factory.mktemp("pareto") / "run"
    code, text = run("pareto", str(model), "--shares", "60,40,0.1", "-o", str(folder), "--json")
    assert code == 0, text
    return folder, json.loads(text.splitlines()[-1])


def test_every_size_has_a_plan_that_fits(done: tuple[Path, dict[str, object]], model: Path) -> None:
    spec = open(model).spec
    points = done[1]["points"]
    assert isinstance(points, list) and [point["share"] for point in points] == [0.6, 0.4]
    for point in points:
        plan = Plan.load(point["plan"])
        assert plan.edited(spec).bytes() == point["bytes"] <= point["share"] * spec.bytes()
        assert point["measured"] > 0 and point["predicted"] > 0
    assert points[1]["measured"] > points[0]["measured"]


def test_the_page_holds_every_point(done: tuple[Path, dict[str, object]]) -> None:
    text = Path(str(done[1]["report"])).read_text()
    points = done[1]["points"]
    assert isinstance(points, list)
    assert all(f"{point['cost'] / 1e6:.1f}" in text for point in points) and "<th scope=\"col\">MB</th>" in text


def test_it_goes_on_from_what_is_finished(done: tuple[Path, dict[str, object]], model: Path) -> None:
    (done[0] / "frontier" / "0.4.json").unlink()
    code, text = run("pareto", str(model), "--shares", "60,40,0.1", "-o", str(done[0]), "--json")
    assert code == 0 and "trying changes" not in text
    assert json.loads(text.splitlines()[-1])["points"] == done[1]["points"]


def test_the_frontier_of_the_cache(model: Path, tmp_path: Path) -> None:
    code, text = run("pareto", str(model), "--of", "cache", "--only", "cache", "--shares", "80,60,1",
                     "-o", str(tmp_path / "run"), "--json")
    assert code == 0 and "1% is left out" in text and "kB of cache a token" in text, text
    spec, points = open(model).spec, json.loads(text.splitlines()[-1])["points"]
    whole = sum(row.cache_bytes(spec.context, spec.dtype) for row in spec.rows)
    assert [point["share"] for point in points] == [0.8, 0.6]
    for point in points:
        rows = Plan.load(point["plan"]).edited(spec).rows
        assert sum(row.cache_bytes(spec.context, spec.dtype) for row in rows) == point["cost"] <= point["share"] * whole
        assert point["bytes"] == spec.bytes()


def test_points_of_another_version_are_told(done: tuple[Path, dict[str, object]], model: Path) -> None:
    file = done[0] / "frontier" / "0.4.json"
    kept = file.read_text()
    file.write_text(json.dumps({name: value for name, value in json.loads(kept).items() if name != "cost"}))
    code, text = run("pareto", str(model), "--shares", "60,40,0.1", "-o", str(done[0]))
    file.write_text(kept)
    assert code != 0 and "--fresh" in text


def test_a_currency_that_is_none_is_refused(model: Path) -> None:
    code, text = run("pareto", str(model), "--of", "money")
    assert code != 0 and "--of money" in text and "cache" in text


@pytest.mark.parametrize("shares", ["", "much", "0", "120"])
def test_a_share_that_is_none_is_refused(model: Path, shares: str) -> None:
    code, text = run("pareto", str(model), "--shares", shares)
    assert code != 0 and "--shares" in text
