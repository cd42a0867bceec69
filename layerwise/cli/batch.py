"""`layerwise batch`: a file of prompts, answered offline."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from layerwise.cli.engine import engine
from layerwise.cli.options import CachePrecision, Device, Json, Layers, demo_names, full
from layerwise.cli.screen import Screen

if TYPE_CHECKING:
    from rich.console import Console


def batch(
    prompts: Annotated[Path, typer.Argument(help='JSON lines: {"prompt": ...}, {"messages": ...}, or OpenAI\'s form.')],
    output: Annotated[Path, typer.Option("-o", "--output", help="File for the answers, in the order of the prompts.")],
    model: Annotated[
        str,
        typer.Option("--model", "-m", help="Demo name, folder, hub id or .gguf file.", autocompletion=demo_names),
    ] = "smollm2",
    max_tokens: Annotated[int, typer.Option("--max-tokens", "-n", help="For lines that do not say.", min=1)] = 256,
    running: Annotated[int, typer.Option("--running", help="Requests at once.", min=1)] = 64,
    cache_tokens: Annotated[
        int | None, typer.Option("--cache-tokens", help="Tokens kept in the caches of all layers.", min=16)
    ] = None,
    device: Device = None,
    cache_precision: CachePrecision = "model",
    layers: Layers = None,
    as_json: Json = False,
) -> None:
    """Answer a file of prompts.

    The same command goes on where it was interrupted, and answers only what is new or changed.
    """
    try:
        from layerwise.serve.batch import Results, read
    except ImportError as error:
        from layerwise.errors import MissingExtra

        raise MissingExtra(error.name or "pydantic", "serve", "a batch") from error

    screen = Screen(as_json)
    caches = [cache_precision, layers.read_text() if layers and layers.exists() else ""]
    lines = read(prompts, {"model": full(model), "defaults": {"max_tokens": max_tokens}}
                 | ({} if caches == ["model", ""] else {"caches": caches}))
    results = Results(output)
    results.resume(lines)
    before = len(results.done)
    if before:
        screen.tell(f"{before} of {len(lines)} lines were answered before")
    failed: list[dict[str, object]] = []
    began = time.monotonic()
    tokens = 0.0
    if before < len(lines):
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        from layerwise.serve.batch import Line
        from layerwise.serve.offline import Offline

        screen.tell(f"opening {model}")
        made = engine(model, device, layers, cache_precision, running=running, cache_tokens=cache_tokens)
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"), TimeRemainingColumn())
        with screen.resumable(), Progress(*columns, console=error_console()) as progress:
            bar = progress.add_task("lines", total=len(lines), completed=before, rate="")

            def told(line: Line, wrong: str | None) -> None:
                if wrong is not None:
                    failed.append({"line": line.number, "error": wrong})
                    words = f"line {line.number}: {wrong}"
                    progress.console.print(words, markup=False, highlight=False, soft_wrap=True)
                rate = made.metrics()["generated_tokens_total"] / max(time.monotonic() - began, 1e-9)
                progress.update(bar, advance=1, rate=f"{rate:.0f} tokens/s")

            began = time.monotonic()
            Offline(made, made.stack.name, results, told).run(lines, 2 * running)
        tokens = made.metrics()["generated_tokens_total"]
    seconds = time.monotonic() - began
    results.finish(lines)
    screen.show(f"{len(lines)} answers in {output}" + (f", {len(failed)} of them errors" if failed else ""))
    screen.finish({"output": output, "lines": len(lines), "before": before, "failed": failed, "tokens": int(tokens),
                   "tokens_per_s": round(tokens / seconds, 2) if tokens else None})


def error_console() -> Console:
    """Where progress is drawn: standard error."""
    from rich.console import Console

    return Console(stderr=True)
