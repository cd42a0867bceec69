"""`layerwise profile`: what each layer does and costs."""

from __future__ import annotations

from typing import Annotated

import typer

from layerwise.cli.options import Data, Fresh, Json, Model, Output, Seed, full, words
from layerwise.cli.screen import Screen


def instruments() -> list[str]:
    """Names of instruments, for completion."""
    from layerwise.measure import INSTRUMENTS

    return list(INSTRUMENTS)


Only = Annotated[str, typer.Option("--only", help="Instruments, separated by commas.", autocompletion=instruments)]
Deep = Annotated[
    bool,
    typer.Option("--deep", help="Also those that try every layer differently: minutes instead of seconds."),
]


def profile(
    model: Model,
    only: Only = "",
    deep: Deep = False,
    data: Data = "default",
    seed: Seed = 0,
    output: Output = None,
    fresh: Fresh = False,
    as_json: Json = False,
) -> None:
    """Show what each layer does and what it costs.

    All instruments that share one pass over the text are used, or those named with --only.
    """
    from layerwise.measure.engine import measure, resolve
    from layerwise.measure.identity import identity
    from layerwise.measure.scores import Scores
    from layerwise.report.optimize import calibration_text
    from layerwise.report.run import Run, default_folder
    from layerwise.stack.open import open

    screen = Screen(as_json)
    names = words(only) or default_instruments(deep)
    resolve(names)
    arguments = {"model": full(model), "instruments": names, "data": full(data), "seed": seed}
    folder = output or default_folder("profile", model, arguments)
    with Run.open(folder, "profile", arguments, fresh=fresh) as run, screen.resumable():
        screen.tell(f"opening {model}")
        stack = open(model)
        run.note("model fingerprint", identity(stack))
        text = calibration_text(stack, data, seed)
        screen.tell(f"measuring {len(stack)} layers on {text.tokens_NT.numel():,} tokens")
        scores = run.step(
            "scores",
            lambda: measure(stack, text, names, seed=seed, resume=run.path("measured.jsonl")),
            file="scores.parquet",
            save=lambda found, path: found.save(path),
            load=Scores.load,
        )
    screen.show(f"\n{stack.spec}\n\n{scores}\n\nscores  {run.path('scores.parquet')}")
    screen.finish(
        {
            "model": model,
            "layers": len(stack),
            "scores": run.path("scores.parquet"),
            "columns": scores.to_json()["columns"],
        }
    )


def default_instruments(deep: bool) -> list[str]:
    """Every instrument; without `deep` only those that need no trial of every layer and no gradients."""
    from layerwise.measure import INSTRUMENTS
    from layerwise.measure.base import Gradient, Intervention

    slow = (Gradient, Intervention)
    return [name for name in INSTRUMENTS if deep or not issubclass(INSTRUMENTS[name], slow)]
