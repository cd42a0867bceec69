"""`layerwise compare`: two models (or two plans) side by side."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from layerwise.cli.options import AnyData, Json, Seed, demo_names
from layerwise.cli.screen import Screen, columns

if TYPE_CHECKING:
    from layerwise.stack.base import Stack

One = Annotated[str, typer.Argument(help="A model as in `profile`, or a plan.json.", autocompletion=demo_names)]
TablesOnly = Annotated[bool, typer.Option("--tables-only", help="Compare the layer tables without running the models.")]

Page = Annotated[Path | None, typer.Option("-o", "--output", help="Also write the map of similarities as a page.")]


SCORES = ("block-influence", "relative-contribution", "logit-lens-kl")
"""Instruments whose columns are set side by side."""


def compare(
    a: One,
    b: One,
    data: AnyData = "default",
    output: Page = None,
    tables_only: TablesOnly = False,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Compare two models, or two plans.

    Models are compared by their layer tables and, unless --tables-only is given, layer against layer (similarity of
    their states, drift of their weights, scores), and language models by size, speed and quality.
    """
    from layerwise.cli.imported import open_model

    screen = Screen(as_json)
    if a.endswith(".json") and b.endswith(".json"):
        return _plans(a, b, screen)
    screen.tell(f"opening {a} and {b}")
    before, after = open_model(a), open_model(b)
    inputs = None if tables_only else _inputs(before, data)
    differences = before.spec.diff(after.spec)
    screen.show(f"{before.spec}\n\n{after.spec}\n")
    result = {"differences": differences, **_sizes(before, after)}
    if not tables_only:
        result |= _layers(before, after, inputs, seed, output, screen)
        result |= _scored(before, after, inputs, seed, screen)
        if before.spec.vocabulary and after.spec.vocabulary:
            result |= _measured(before, after, data, seed, screen)
    elif not differences:
        screen.show("the tables are equal")
    screen.finish(result)


def _plans(a: str, b: str, screen: Screen) -> None:
    from layerwise.allocate.plan import Plan

    differences = Plan.load(a).diff(Plan.load(b))
    screen.show("\n".join(differences) or "the plans are equal")
    screen.finish({"differences": differences})


def _inputs(stack: Stack, data: str) -> Any:
    """Unseen text for a language model, what the user's code makes for any other."""
    from layerwise.cli.imported import check_text, imported, names_code
    from layerwise.report.verify import verification_text

    if names_code(data):
        found = imported(data)
        return list(found) if isinstance(found, Iterator) else found
    check_text(stack)
    return verification_text(stack, data).take(8)


def _scored(a: Stack, b: Stack, inputs: Any, seed: int, screen: Screen) -> dict[str, object]:
    """What one pass says of the layers of each, side by side where they are as many."""
    from layerwise.measure.engine import measure, supported

    names = supported(b, supported(a, SCORES))
    both = [measure(stack, inputs, names, seed=seed, progress=False) for stack in (a, b)]
    if len(a) == len(b):
        table = [["layer", *both[0].columns]]
        for layer in range(len(a)):
            pairs = [[scores[name].values[layer] for scores in both] for name in both[0].columns]
            table.append([str(layer), *(f"{one:.3g} -> {other:.3g}" for one, other in pairs)])
        screen.show(f"scores of layers\n{columns(table)}\n")
    return {"scores": [{name: column.values for name, column in scores.columns.items()} for scores in both]}


def _layers(a: Stack, b: Stack, inputs: Any, seed: int, output: Path | None, screen: Screen) -> dict[str, object]:
    """Every layer of one beside the layer of the other at the same relative depth, and the one most alike."""
    from layerwise.io import atomic
    from layerwise.measure.similarity import drift, similarity
    from layerwise.report.charts import similarity_chart

    screen.tell("comparing the states that leave every layer")
    found_LM, chance = similarity(a, b, inputs, seed=seed)
    moved = drift(a, b) if len(a) == len(b) else []
    table = [["layer", "at its depth", "most alike", "weights moved"]]
    for layer, row_M in enumerate(found_LM.tolist()):
        same = round(layer * (len(b) - 1) / max(1, len(a) - 1))
        best = max(range(len(b)), key=row_M.__getitem__)
        far = max(moved[layer].values(), default=0.0) if moved else None
        table.append([str(layer), f"{row_M[same]:.3f} (layer {same})", f"{row_M[best]:.3f} (layer {best})",
                      "" if far is None else f"{far:.1%}"])
    screen.show(f"similarity of states (linear CKA; {chance:.3f} between shuffled tokens)\n{columns(table)}\n")
    if output:
        page = similarity_chart(found_LM.tolist()).to_html(include_plotlyjs=True)
        screen.show(f"map  {atomic.write_text(output, page)}\n")
    return {"similarity": found_LM.tolist(), "similarity_of_shuffled": chance, "drift": moved}


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
