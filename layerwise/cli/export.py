"""`layerwise export`: write a model or its plan as another tool reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from layerwise.cli.options import Json
from layerwise.cli.screen import Screen


def targets() -> list[str]:
    """Names of exports, for completion."""
    from layerwise.export import EXPORTS

    return list(EXPORTS)


def export(
    source: Annotated[str, typer.Argument(help="A run folder of optimize, a saved model, or a model with --plan.")],
    to: Annotated[
        str,
        typer.Option(
            "--to",
            help="gguf, compressed-tensors, mergekit, torchao-rules, llama.cpp-rules or peft-ranks.",
            autocompletion=targets,
        ),
    ],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="File or folder to write; by default beside the run.")
    ] = None,
    plan: Annotated[
        Path | None, typer.Option("--plan", help="The plan.json that the rules follow, for a model without a run.")
    ] = None,
    requantize: Annotated[
        bool, typer.Option("--allow-requantize", help="Round matrices again whose format the target lacks.")
    ] = False,
    wider: Annotated[
        bool, typer.Option("--allow-wider", help="Store such matrices unchanged in a type of more bits.")
    ] = False,
    dense: Annotated[
        bool, typer.Option("--allow-dense", help="Store such matrices unpacked; leave them out of rules.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Write a model or its plan as another tool reads it.

    A choice that the target cannot express is an error that names it and says what to allow. The output is
    written whole or not at all.
    """
    from layerwise.export import EXPORTS
    from layerwise.export.base import Allowed
    from layerwise.export.source import Source
    from layerwise.report.table import size

    screen = Screen(as_json)
    kind = EXPORTS[to]()
    given = Source.open(source, plan)
    target = output or default_output(source, to, kind.suffix)
    screen.tell(f"writing {kind.summary}")
    written = kind.write(given, target, Allowed(requantize, wider, dense))
    for note in written.notes:
        screen.show(note)
    screen.show(f"{size(written.bytes)} in {written.path}")
    screen.finish({"to": to, "output": written.path, "bytes": written.bytes, "notes": list(written.notes)})


def default_output(source: str, to: str, suffix: str) -> Path:
    """`run/model.gguf`, `run/mergekit.yaml`; beside the working folder's files where there is no folder."""
    folder = Path(source)
    name = "model" if to == "gguf" else to
    return (folder if (folder / "run.json").exists() else Path()) / f"{name}{suffix}"
