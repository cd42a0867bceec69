"""The page stands alone, escapes what it is given, and shows every chart."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from layerwise.measure.scores import Column, Scores
from layerwise.report.charts import bits_chart, column_chart, rank_chart
from layerwise.report.html import profile_page
from layerwise.report.report import Report

Tried = list[dict[str, object]]


class Page(HTMLParser):
    """Collects tags, attributes, and the contents of scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.words: list[str] = []
        self._script = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._script = tag == "script"

    def handle_endtag(self, tag: str) -> None:
        self._script = False

    def handle_data(self, data: str) -> None:
        (self.scripts if self._script else self.words).append(data)


@pytest.fixture(scope="module")
def text(report: Report, scores: Scores, tried: Tried, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("page") / "report.html"
    return report.html(path, scores=scores, tried=tried, plan={"edits": ["<b>"]}).read_text()


@pytest.fixture(scope="module")
def page(text: str) -> Page:
    parser = Page()
    parser.feed(text)
    return parser


def test_nothing_is_loaded_from_elsewhere(page: Page) -> None:
    for tag, attributes in page.tags:
        assert not {"src", "href"} & set(attributes), tag
        assert tag not in ("link", "iframe", "img", "object")


def test_plotly_is_inside_once(page: Page, text: str) -> None:
    assert text.count("plotly.js v") == 1
    assert len(page.scripts) == 3


def test_every_chart_has_its_figure_and_a_description(page: Page) -> None:
    figures = json.loads(page.scripts[0])
    places = [attributes for tag, attributes in page.tags if "data-figure" in attributes]
    assert {place["data-figure"] for place in places} == {"before-after", "bits", "score-0", "tried"}
    assert set(figures) == {"before-after", "bits", "tried", "score-0", "score-1"}
    assert all(place["role"] == "img" and place["aria-label"] for place in places)


def test_what_is_given_is_shown_as_text(page: Page) -> None:
    words = " ".join(page.words)
    assert "tiny <model> & co" in words
    assert "</script><script>alert(1)</script>" in words


def test_every_instrument_can_be_selected(page: Page) -> None:
    options = [attributes for tag, attributes in page.tags if tag == "option"]
    assert [option["value"] for option in options] == ["0", "1"]
    assert "high means important" in str(options[0]["data-about"])


def test_words_come_before_charts(text: str) -> None:
    assert text.index("of its bytes") < text.index("data-figure")


def test_the_same_report_gives_the_same_page(
    report: Report, scores: Scores, tried: Tried, text: str, tmp_path: Path
) -> None:
    again = report.html(tmp_path / "b.html", scores=scores, tried=tried, plan={"edits": ["<b>"]})
    assert again.read_text() == text


def test_a_page_without_scores_or_plans(report: Report, tmp_path: Path) -> None:
    text = report.html(tmp_path / "report.html").read_text()
    assert "What was tried" not in text and "Instrument" not in text


def test_a_notebook_gets_tables_without_scripts(report: Report) -> None:
    html = report._repr_html_()
    assert "<table>" in html and not re.search(r"<script(?!>alert)", html)
    assert "&lt;script&gt;alert" in html


def test_the_heat_map_has_a_cell_for_every_matrix(report: Report) -> None:
    (trace,) = bits_chart(report.layers).data
    assert len(trace.z) == 7 and all(len(row) == 8 for row in trace.z)
    assert trace.text[0][5] == "-"


def test_a_score_chart_shows_what_is_outside_the_layers(scores: Scores) -> None:
    (trace,) = column_chart(scores["quantization-sensitivity:4"]).data
    assert trace.x[-1] == "embedding" and len(trace.x) == 9


def test_layers_without_a_difference_have_one_shade() -> None:
    nan = float("nan")
    columns = [Column(name, values, "nats", important, "made up") for name, values, important in (
        ("zero", (0.0, 0.0, 0.0, nan), "high"), ("tied", (2.0, 1.0, 2.0, 5.0), "high"),
        ("low", (1.0, 2.0, 3.0, nan), "low"), ("nothing", (nan,) * 4, "high"), ("cost", (1.0, 2.0, 3.0, 4.0), None))]
    (trace,) = rank_chart(columns).data  # type: ignore[arg-type]
    assert list(trace.y) == ["zero", "tied", "low", "nothing"] and (trace.zmin, trace.zmax) == (0, 1)
    zero, tied, low, nothing = ([value and round(value, 6) for value in row] for row in trace.z)
    assert zero == [round(2 / 3, 6)] * 3 + [None] and nothing == [None] * 4
    assert tied == [2.5 / 4, 1 / 4, 2.5 / 4, 1.0]
    assert low == [1.0, round(2 / 3, 6), round(1 / 3, 6), None]


def test_numbers_that_are_not_there_are_blank_and_tables_have_rows(scores: Scores) -> None:
    unknown = Column("tried", (float("nan"),) * (len(scores.spec.rows) - 1) + (1.5,), "nats", "high", "made up")
    text = profile_page(replace(scores, columns={**scores.columns, "tried": unknown}), "made up")
    assert "<td>nan</td>" not in text and "<td></td>" in text and "<td>1.5</td>" in text
    assert '<th scope="row">embedding</th>' in text


def test_what_parts_of_a_measurement_share_is_said_once(scores: Scores) -> None:
    first = {"data": "wide & deep", "lens_tokens": None, "instruments": [{"name": "zd"}, {"name": "lim"}]}
    merged = {"merged": [first, {**first, "instruments": [{"name": "taylor"}]}]}
    text = profile_page(replace(scores, provenance=merged), "made up")
    assert text.count("wide &amp; deep") == 1 and "lens" not in text.split("Where the numbers come from")[1]
    assert "part 1: instruments" in text and "zd, lim" in text and "part 2: instruments" in text
