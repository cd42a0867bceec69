"""The report as one page that needs nothing else: text, charts and their script are all inside."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from layerwise.report import charts, studies
from layerwise.report.findings import findings
from layerwise.report.layers import runs
from layerwise.report.report import Report
from layerwise.report.table import negligible, predictions, rows
from layerwise.report.words import summary

if TYPE_CHECKING:
    from jinja2 import Environment
    from plotly.graph_objects import Figure

    from layerwise.measure.scores import Column, Scores

FILES = ("base.html", "page.html", "profile.html", "frontier.html", "fragment.html", "scores.html", "style.css",
         "page.js")


def page(
    report: Report,
    *,
    scores: Scores | None = None,
    plan: Mapping[str, Any] | None = None,
    tried: Sequence[Mapping[str, Any]] = (),
) -> str:
    """The whole page. `plan` is a plan as plain values, shown as it was written."""
    from plotly.offline import get_plotlyjs

    figures = {"before-after": charts.before_after_chart(report)}
    if any(change.bits for change in report.layers if isinstance(change.layer, int)):
        figures["bits"] = charts.bits_chart(report.layers)
    if tried:
        figures["tried"] = charts.tried_chart(tried)
    columns = _shown(scores) if scores else []
    for index, column in enumerate(columns):
        figures[f"score-{index}"] = charts.column_chart(column)
    return (
        _environment()
        .get_template("page.html")
        .render(
            **_shared(report, tried),
            figures={name: _plain(figure) for name, figure in figures.items()},
            columns=columns,
            outside=_outside(columns),
            tried=sorted(tried, key=lambda point: (point["kl"], point["name"])),
            plan=json.dumps(plan, indent=1) if plan else None,
            provenance=list(_flat(report.provenance)),
            plotly=get_plotlyjs(),
        )
    )


def profile_page(scores: Scores, model: str) -> str:
    """What was measured in one model: findings in words, then charts, then numbers."""
    from plotly.offline import get_plotlyjs

    columns = _shown(scores)
    figures = {f"score-{index}": charts.column_chart(column) for index, column in enumerate(columns)}
    figures["map"] = charts.rank_chart(columns)
    if "roofline:attained" in scores:
        figures["roofline"] = charts.roofline_chart(scores)
    facts = {name.removeprefix("knowledge:"): column.values for name, column in scores.columns.items()
             if name.startswith("knowledge:") and any(value == value for value in column.values)}
    if facts:
        lost_LK = list(zip(*facts.values(), strict=True))
        figures["knowledge"] = studies.heat_chart(lost_LK, list(facts), unit="nats lost", columns="kind of fact",
                                                  centred=True)
    if "energy:prompt" in scores:
        figures["energy"] = studies.energy_chart(scores)
    if "manifold:intrinsic-dimension" in scores:
        figures["manifold"] = studies.manifold_chart(scores)
    return (
        _environment()
        .get_template("profile.html")
        .render(
            model=model,
            findings=findings(scores),
            hidden=scores.spec.hidden,
            figures={name: _plain(figure) for name, figure in figures.items()},
            columns=columns,
            outside=_outside(columns),
            provenance=list(_flat(scores.provenance)),
            plotly=get_plotlyjs(),
        )
    )


def frontier_page(points: Sequence[Mapping[str, Any]], model: str, whole: float, written: tuple[str, float]) -> str:
    """What is lost at every share of a cost: a chart and a table.

    Each point has `share`, `cost`, `measured` and `predicted`; costs are `written` in a unit of so much.
    """
    from plotly.offline import get_plotlyjs

    return (
        _environment()
        .get_template("frontier.html")
        .render(model=model, points=points, whole=whole, unit=written[0], scale=written[1], plotly=get_plotlyjs(),
                figures={"frontier": _plain(charts.frontier_chart(points, *written))})
    )


def _shown(scores: Scores) -> list[Column]:
    """The columns that a person reads: not the errors of single matrices, nor what only tables were tried in."""
    return [column for name, column in scores.columns.items()
            if not name.startswith("output-error:") and any(value == value for value in column.values)]


def fragment(report: Report) -> str:
    """The words and tables of the report without scripts, for a notebook cell."""
    return _environment().get_template("fragment.html").render(**_shared(report, ()))


def _shared(report: Report, tried: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {
        "report": report,
        "summary": summary(report, tried),
        "rows": rows(report),
        "predictions": predictions(report),
        "negligible": negligible(report),
        "runs": list(runs(report.layers)),
    }


@cache
def _environment() -> Environment:
    from jinja2 import DictLoader, Environment, StrictUndefined

    folder = files("layerwise.report")
    sources = {name: folder.joinpath(name).read_text("utf-8") for name in FILES}
    made = Environment(
        loader=DictLoader(sources),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.globals["number"] = _number
    return made


def _number(value: float | None) -> str:
    """Four digits; nothing for what was not measured."""
    return "" if value is None or value != value else f"{value:.4g}"


def _outside(columns: Sequence[Column]) -> list[str]:
    """What lies outside the layers and has a number in some column."""
    return list(dict.fromkeys(place for column in columns for place in column.outside))


def _plain(figure: Figure) -> Any:
    return json.loads(figure.to_json())


def _flat(value: Mapping[str, Any], prefix: str = "") -> Any:
    """Nested provenance as (name, value) pairs: of named things the names, of long lists the length, what several
    runs share once, and nothing of what was left open."""
    for name, item in value.items():
        title = f"{prefix}{name.replace('_', ' ')}"
        if item is None:
            continue
        if isinstance(item, Mapping):
            yield from _flat(item, f"{title}: ")
        elif isinstance(item, (list, tuple)) and item and all(isinstance(part, Mapping) for part in item):
            if all("name" in part for part in item):
                yield title, ", ".join(part["name"] for part in item)
            else:
                yield from _runs(item, prefix)
        elif isinstance(item, (list, tuple)) and len(item) > 8:
            yield title, f"{len(item)} values"
        else:
            yield title, item


def _runs(parts: Sequence[Mapping[str, Any]], prefix: str) -> Any:
    """What all parts say, then what each says alone."""
    shared = {name: item for name, item in parts[0].items() if all(part.get(name, ...) == item for part in parts)}
    yield from _flat(shared, prefix)
    for place, part in enumerate(parts, 1):
        yield from _flat({name: item for name, item in part.items() if name not in shared}, f"{prefix}part {place}: ")
