"""`layerwise compare`: two models (or two plans) side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from layerwise.cli.options import Data, Json, Seed, demo_names
from layerwise.cli.screen import Screen

if TYPE_CHECKING:
    from layerwise.stack.base import Stack

One = Annotated[str, typer.Argument(help="A model, or a plan.json.", autocompletion=demo_names)]
TablesOnly = Annotated[bool, typer.Option("--tables-only", help="Compare the layer tables without running the models.")]


def compare(
    a: One,
    b: One,
    data: Data = "default",
    tables_only: TablesOnly = False,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Compare two models, or two plans.

    Models are compared by their layer tables and, unless --tables-only is given, by size, speed and quality.
    """
    from layerwise.stack.open import open

    screen = Screen(as_json)
    if a.endswith(".json") and b.endswith(".json"):
        return _plans(a, b, screen)
    screen.tell(f"opening {a} and {b}")
    before, after = open(a), open(b)
    differences = before.spec.diff(after.spec)
    screen.show(f"{before.spec}\n\n{after.spec}\n")
    result = {"differences": differences, **_sizes(before, after)}
    if not tables_only:
        result |= _measured(before, after, data, seed, screen)
    elif not differences:
        screen.show("the tables are equal")
    screen.finish(result)


def _plans(a: str, b: str, screen: Screen) -> None:
    from layerwise.allocate.plan import Plan

    differences = Plan.load(a).diff(Plan.load(b))
    screen.show("\n".join(differences) or "the plans are equal")
    screen.finish({"differences": differences})


def _sizes(before: Stack, after: Stack) -> dict[str, object]:
    sides = {"before": before, "after": after}
    return {name: {"bytes": stack.spec.bytes(), "parameters": stack.spec.parameters()} for name, stack in sides.items()}


def _measured(before: Stack, after: Stack, data: str, seed: int, screen: Screen) -> dict[str, object]:
    from layerwise.report.verify import verify

    screen.tell("running both on the same text")
    report = verify(before, after, data, seed=seed, progress=True)
    screen.show(report)
    return {
        "before": report.before.to_json(),
        "after": report.after.to_json(),
        "kl": report.kl.value,
        "agreement": report.agreement.value,
    }
