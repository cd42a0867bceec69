"""`layerwise systems`: every published system, and which of them can be reproduced."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from layerwise.cli.options import Json
from layerwise.cli.screen import Screen, columns


def families() -> list[str]:
    """The families of the catalogue, for completion."""
    from layerwise.systems.catalogue import catalogue

    return sorted({entry.family for entry in catalogue().values()})


def systems(
    family: Annotated[str | None, typer.Option("--family", help="Only this family.", autocompletion=families)] = None,
    done: Annotated[bool, typer.Option("--done", help="Only those that can be reproduced.")] = False,
    as_json: Json = False,
) -> None:
    """List the published systems."""
    from layerwise.errors import UnknownName
    from layerwise.systems.catalogue import catalogue
    from layerwise.systems.record import held, results

    entries = list(catalogue().values())
    if family is not None and family not in families():
        raise UnknownName("family", family, families())
    chosen = [entry for entry in entries if family in (None, entry.family) and (entry.state == "done" or not done)]
    screen = Screen(as_json)
    found = {system: held(record) for system, record in results().items()}
    table = [
        (entry.id, entry.family, entry.state, found.get(entry.id, ""), str(entry.year), entry.title) for entry in chosen
    ]
    screen.show(columns([("id", "family", "state", "claims that hold", "year", "title"), *table]))
    count = sum(entry.state == "done" for entry in chosen)
    screen.show(f"\n{len(chosen)} systems, {count} of them done: layerwise reproduce <id>")
    screen.finish({"systems": [{**asdict(entry), "held": found.get(entry.id)} for entry in chosen]})
