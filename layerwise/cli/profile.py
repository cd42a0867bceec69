"""`layerwise profile`: what each layer does and costs."""

from __future__ import annotations

from dataclasses import replace
from functools import partial, reduce
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from layerwise.cli.options import AnyData, AnyModel, Fresh, Json, Output, Seed, full, words
from layerwise.cli.screen import Screen

if TYPE_CHECKING:
    from layerwise.measure.scores import Scores
    from layerwise.stack.base import Stack

TRIED_TOKENS = 1024
"""Tokens of text on which alternatives for layers are tried: each costs half a pass, and every layer has several."""


def instruments() -> list[str]:
    """Names of instruments, for completion."""
    from layerwise.measure import INSTRUMENTS

    return list(INSTRUMENTS)


Only = Annotated[str, typer.Option("--only", help="Instruments, separated by commas.", autocompletion=instruments)]
Deep = Annotated[
    bool,
    typer.Option("--deep", help="Also gradients, and what tries every layer differently: minutes to an hour."),
]
Blocks = Annotated[
    int | None,
    typer.Option("--blocks", min=1, help=f"Blocks of text that are read; by default 18 of 512 tokens, and "
                                         f"alternatives for layers are tried on {TRIED_TOKENS} of those tokens."),
]


def profile(
    model: AnyModel,
    only: Only = "",
    deep: Deep = False,
    data: AnyData = "default",
    blocks: Blocks = None,
    seed: Seed = 0,
    output: Output = None,
    fresh: Fresh = False,
    as_json: Json = False,
) -> None:
    """Show what each layer does and what it costs.

    All instruments that share one pass over the data are used, or those named with --only. Results come in words, as a
    table, as a page with charts, and with --json as values.
    """
    from layerwise.cli.imported import open_model
    from layerwise.io import atomic
    from layerwise.measure.engine import resolve
    from layerwise.measure.identity import identity
    from layerwise.measure.scores import Scores
    from layerwise.report.findings import findings
    from layerwise.report.html import profile_page
    from layerwise.report.run import Run, default_folder

    screen = Screen(as_json)
    names = words(only) or default_instruments(deep)
    resolve(names)
    arguments = {"model": full(model), "instruments": names, "data": full(data), "blocks": blocks, "seed": seed}
    folder = output or default_folder("profile", model, arguments)
    with Run.open(folder, "profile", arguments, fresh=fresh) as run, screen.resumable():
        screen.tell(f"opening {model}")
        stack = open_model(model)
        run.note("model fingerprint", identity(stack))
        inputs = _inputs(stack, data, blocks, seed)
        chosen = names if only else _possible(stack, names, inputs, screen)
        parts = _parts(chosen, inputs, blocks)
        found = []
        for part, (those, read) in parts.items():
            screen.tell(f"{part}: {len(stack)} layers by {len(those)} instruments")
            work = partial(_measured, stack, read, those, data, seed=seed, resume=run.path("measured.jsonl"))
            found.append(run.step(part, work, file=f"{part}.parquet", save=_save, load=Scores.load))
        scores = run.step("scores", lambda: _known(reduce(Scores.merge, found), stack, deep and not only),
                          file="scores.parquet", save=_save, load=Scores.load)
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
    if not (deep or only):
        facts = ", and where facts are written" if stack.spec.vocabulary else ""
        screen.show(f"\nWhat taking each layer away does{facts}: --deep")
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


def _measured(stack: Stack, inputs: Any, names: list[str], data: str, **options: Any) -> Scores:
    """The columns, with the user's own name for the data where it has none itself."""
    from layerwise.cli.imported import names_code
    from layerwise.measure.engine import measure

    scores = measure(stack, inputs, names, **options)
    return replace(scores, provenance={**scores.provenance, "data": data}) if names_code(data) else scores


def _parts(names: list[str], inputs: Any, blocks: int | None) -> dict[str, tuple[list[str], Any]]:
    """The instruments that read all data, and those that try alternatives, each with what it reads."""
    from layerwise.data.text import TextData
    from layerwise.measure import INSTRUMENTS
    from layerwise.measure.base import Intervention

    few = inputs
    if isinstance(inputs, TextData) and blocks is None:
        few = inputs.take(max(1, TRIED_TOKENS // inputs.length))
    trying = [name for name in names if issubclass(INSTRUMENTS[name], Intervention)]
    parts = {"measuring": ([name for name in names if name not in trying], inputs), "trying": (trying, few)}
    return {part: given for part, given in parts.items() if given[0]}


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


def _save(scores: Scores, path: Path) -> Path:
    return scores.save(path)


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


def _inputs(stack: Stack, data: str, blocks: int | None, seed: int) -> Any:
    """Text for a language model, what the user's code makes for any other."""
    from layerwise.cli.imported import check_text, imported, names_code
    from layerwise.report.optimize import calibration_text

    if names_code(data):
        return imported(data)
    check_text(stack)
    return calibration_text(stack, data, seed, blocks)


def default_instruments(deep: bool) -> list[str]:
    """Every instrument that is not for plans; without `deep` only those that need no trial, no gradients and little
    beside the pass."""
    from layerwise.measure import INSTRUMENTS
    from layerwise.measure.base import Gradient, Intervention

    kinds = {name: INSTRUMENTS[name] for name in INSTRUMENTS}
    return [name for name, kind in kinds.items() if not kind.for_plans
            and (deep or not (kind.slow or issubclass(kind, (Gradient, Intervention))))]
