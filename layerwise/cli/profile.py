"""`layerwise profile`: what each layer does and costs."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from layerwise.cli.options import Data, Fresh, Json, Model, Output, Seed, full, words
from layerwise.cli.screen import Screen
from layerwise.errors import BadData

if TYPE_CHECKING:
    from layerwise.measure.scores import Scores
    from layerwise.stack.base import Stack


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
    from layerwise.cli.imported import open_model
    from layerwise.io import atomic
    from layerwise.measure.engine import measure, resolve
    from layerwise.measure.identity import identity
    from layerwise.measure.scores import Scores
    from layerwise.report.findings import findings
    from layerwise.report.html import profile_page
    from layerwise.report.run import Run, default_folder

    screen = Screen(as_json)
    names = words(only) or default_instruments(deep)
    resolve(names)
    arguments = {"model": full(model), "instruments": names, "data": full(data), "seed": seed}
    folder = output or default_folder("profile", model, arguments)
    with Run.open(folder, "profile", arguments, fresh=fresh) as run, screen.resumable():
        screen.tell(f"opening {model}")
        stack = open_model(model)
        run.note("model fingerprint", identity(stack))
        inputs = _inputs(stack, data, seed)
        chosen = names if only else _possible(stack, names, inputs, screen)
        screen.tell(f"measuring {len(stack)} layers by {len(chosen)} instruments")
        scores = run.step(
            "scores",
            lambda: _known(measure(stack, inputs, chosen, seed=seed, resume=run.path("measured.jsonl")),
                           stack, deep and not only),
            file="scores.parquet",
            save=lambda found, path: found.save(path),
            load=Scores.load,
        )
        run.step(
            "page",
            lambda: profile_page(scores, stack.name),
            file="report.html",
            save=lambda text, path: atomic.write_text(path, text),
            load=lambda path: path,
        )
    said = findings(scores)
    screen.show(f"\n{stack.spec}\n\n{scores}\n")
    for finding in said:
        screen.show(f"{'' if finding.sure else 'uncertain: '}{finding.text}")
    screen.show(f"\nscores  {run.path('scores.parquet')}\nreport  {run.path('report.html')}")
    screen.finish(
        {
            "model": model,
            "layers": len(stack),
            "scores": run.path("scores.parquet"),
            "report": run.path("report.html"),
            "findings": [{"text": finding.text, "sure": finding.sure} for finding in said],
            "columns": scores.to_json()["columns"],
        }
    )


def _possible(stack: Stack, names: list[str], inputs: Any, screen: Screen) -> list[str]:
    """The instruments that this model and data allow; says which are left out, and why."""
    from layerwise.measure.engine import lacking

    reasons = {name: lacking(stack, name, inputs) for name in names}
    missing: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        if reason is not None:
            missing.setdefault(reason.expected, []).append(name)
    for expected, without in missing.items():
        screen.tell(f"left out, for want of {expected}: {', '.join(without)}")
    return [name for name in names if reasons[name] is None]


def _known(scores: Scores, stack: Stack, wanted: bool) -> Scores:
    """With columns of where facts are written, if they are wanted and the model reads text."""
    from layerwise.measure.knowledge import knowledge
    from layerwise.stack.decoder import DecoderStack
    from layerwise.stack.vision import VisionLanguageStack

    reads = isinstance(stack, DecoderStack) and not isinstance(stack, VisionLanguageStack)
    if not wanted or not reads or stack.tokenizer is None:
        return scores
    assert isinstance(stack, DecoderStack)
    chances, columns = knowledge(stack, stack.tokenizer)
    return replace(scores, columns={**scores.columns, **{column.name: column for column in columns}},
                   provenance={**scores.provenance, "knowledge": dict(chances)})


def _inputs(stack: Stack, data: str, seed: int) -> Any:
    """Text for a language model, what the user's code makes for any other."""
    from layerwise.cli.imported import imported, names_code
    from layerwise.report.optimize import calibration_text
    from layerwise.stack.decoder import DecoderStack

    if names_code(data):
        return imported(data)
    if not isinstance(stack, DecoderStack) and stack.tokenizer is None:
        raise BadData(
            f"no data for {stack.name}, which reads no text",
            expected="batches of what its forward pass takes",
            do="--data FILE.py:NAME, a list of batches or a function that makes one",
        )
    return calibration_text(stack, data, seed)


def default_instruments(deep: bool) -> list[str]:
    """Every instrument; without `deep` only those that need no trial, no gradients and little beside the pass."""
    from layerwise.measure import INSTRUMENTS
    from layerwise.measure.base import Gradient, Intervention

    kinds = {name: INSTRUMENTS[name] for name in INSTRUMENTS}
    return [name for name, kind in kinds.items()
            if deep or not (kind.slow or issubclass(kind, (Gradient, Intervention)))]
