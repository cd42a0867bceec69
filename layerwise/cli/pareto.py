"""`layerwise pareto`: what is lost at every size, as a table and a page."""

from __future__ import annotations

from typing import Annotated

import typer

from layerwise.cli.optimize import Only
from layerwise.cli.options import Data, Fresh, Json, Model, Output, Seed, full, words
from layerwise.cli.screen import Screen
from layerwise.errors import BadOption


def currencies() -> list[str]:
    """Names of currencies, for completion."""
    from layerwise.report.frontier import UNITS

    return list(UNITS)


Of = Annotated[str, typer.Option("--of", help="Currency of the shares: bytes, cache, milliseconds, layers, ...",
                                 autocompletion=currencies)]
Shares = Annotated[str, typer.Option("--shares", help="Shares of what the model costs now, in percent, by commas.")]


def pareto(
    model: Model,
    of: Of = "bytes",
    shares: Shares = "60,50,40,35,30,25",
    only: Only = "",
    data: Data = "default",
    seed: Seed = 0,
    output: Output = None,
    fresh: Fresh = False,
    as_json: Json = False,
) -> None:
    """Show what a model loses at every size, or with every share of its cache, of its time, or of another currency.

    For each share a plan is made, carried out and measured. Take one of them further with
    `layerwise apply MODEL run/frontier/0.35-plan.json`, or with `layerwise optimize MODEL --bytes 35%`.
    """
    from layerwise.io import atomic
    from layerwise.report.alternatives import check_words
    from layerwise.report.frontier import UNITS, frontier, table
    from layerwise.report.html import frontier_page
    from layerwise.report.run import Run, default_folder

    screen = Screen(as_json)
    alternatives, wanted = words(only), _shares(shares)
    check_words(alternatives)
    if of not in UNITS:
        raise BadOption(f"--of {of}", expected=f"one of {', '.join(UNITS)}", do="correct the word")
    arguments = {"model": full(model), "shares": wanted, "only": alternatives, "data": full(data), "seed": seed,
                 **({} if of == "bytes" else {"of": of})}
    folder = output or default_folder("pareto", model, arguments)
    with Run.open(folder, "pareto", arguments, fresh=fresh) as run, screen.resumable():
        points, whole = frontier(model, run, of=of, shares=wanted, only=alternatives, data=data, seed=seed,
                                 tell=screen.tell)
        values = [{**point.to_json(), "words": point.plan.describe().partition(";")[0]} for point in points]
        page = atomic.write_text(run.path("report.html"), frontier_page(values, model, whole, UNITS[of]))
        for point in points:
            point.plan.save(run.path(f"frontier/{point.share:g}-plan.json"))
    screen.show(f"\n{table(points, whole, of)}\n\nplans   {run.path('frontier')}\nreport  {page}")
    screen.finish({"report": page, "points": [{**value, "plan": run.path(f"frontier/{point.share:g}-plan.json")}
                                              for point, value in zip(points, values, strict=True)]})


def _shares(text: str) -> list[float]:
    try:
        found = [float(word.strip().rstrip("%")) / 100 for word in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(0 < share <= 1 for share in found):
        raise BadOption(f"--shares {text}", expected="percentages above 0, such as 60,45,30", do="correct the list")
    return found
