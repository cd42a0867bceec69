"""`verify`: run a model and its edited copy on the same text, and say what changed and how sure that is."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from layerwise.allocate.plan import Plan
from layerwise.data.bootstrap import paired_ratio_interval, ratio_interval
from layerwise.data.metrics import Losses
from layerwise.data.sequential import Stop
from layerwise.data.tasks import MultipleChoice
from layerwise.data.text import TextData, encoder, text_blocks
from layerwise.errors import BadData, BadOption
from layerwise.report.compared import AT_ONCE, Compared, accuracy_change, answers, compare_on, loss_change
from layerwise.report.files import weight_bytes
from layerwise.report.layers import kept_layers, layer_changes
from layerwise.report.machine import machine, versions
from layerwise.report.probe import Probe, probe
from layerwise.report.report import Measurement, Paired, Report, TaskResult, TextResult
from layerwise.stack.base import Stack

__all__ = ["Compared", "Measurement", "Paired", "Report", "TaskResult", "TextResult", "compare_on", "verify"]

BLOCKS, LENGTH = 24, 512
QUESTIONS = 48
OTHER = "docstrings"
"""Text of another kind than the default, which no step of a run reads before it is verified."""

TOLERANCE, POINTS = 0.01, 0.05
"""Differences that count as negligible: nats per token (about one percent of perplexity), and share of questions."""


def verify(
    before: Stack,
    after: Stack,
    data: TextData | str | Path,
    *,
    tasks: Iterable[str | MultipleChoice] | None = None,
    texts: Iterable[TextData | str | Path] | None = None,
    seed: int = 0,
    kept: Sequence[int] | None = None,
    speeds: bool = True,
    progress: bool = False,
) -> Report:
    """Compare two models on the same text, and measure size, speed and memory of each.

    `data` should be text that had no part in making `after`: the verification split of a source, which is
    taken where `data` names a source. `texts` are further texts; one of another kind than the default if None, and
    `tasks` multiple-choice tasks or their names, questions from the default text if None, both where `before` has a
    tokenizer. Further texts and tasks run until it is clear whether the difference is negligible (see
    `layerwise.data.sequential`), which `tests` in the report say; `data` itself is always read whole. `kept` says which
    row of `before` each row of `after` comes from; a stack made by `apply` knows. Without `speeds` no fresh
    process is started. `progress` shows a bar on standard error. Raises BadData for text that does not fit
    the models or losses that are not finite, BadOption for models with different vocabularies.
    """
    if before.spec.vocabulary and after.spec.vocabulary and before.spec.vocabulary != after.spec.vocabulary:
        raise BadOption(
            f"models with {before.spec.vocabulary} and {after.spec.vocabulary} tokens",
            expected="two models that share a tokenizer",
            do="compare a model with its own edited copy",
        )
    text = data if isinstance(data, TextData) else verification_text(before, data)
    others = [one if isinstance(one, TextData) else verification_text(before, one) for one in texts or ()]
    others = _default_texts(before, text) if texts is None else others
    questions = _default_tasks(before, seed) if tasks is None else list(map(_named_task, tasks))
    compared = compare_on(before, after, text, progress=progress)
    more = {other.name: _text(before, after, other, seed, progress) for other in others}
    asked = {task.name: _task(before, after, task, seed, progress) for task in questions}
    probes = [probe(stack) if speeds else Probe(None, None, None, "not asked for") for stack in (before, after)]
    positions = compared.positions_N
    change = paired_ratio_interval((compared.before.sum_N, compared.before.tokens_N),
                                   (compared.after.sum_N, compared.after.tokens_N), seed=seed)
    tests = {f"perplexity, {text.name}": Paired.of(change, TOLERANCE, len(text), len(text)),
             **{f"perplexity, {name}": test for name, (_, test) in more.items()},
             **{f"accuracy, {name}": test for name, (_, test) in asked.items()}}
    return Report(
        model=before.name,
        before=_measurement(before, compared.before, probes[0], seed),
        after=_measurement(after, compared.after, probes[1], seed),
        log_perplexity_change=change,
        kl=ratio_interval(compared.kl_N, positions, seed=seed),
        agreement=ratio_interval(compared.same_N, positions, seed=seed),
        layers=layer_changes(before.spec, after.spec, kept if kept is not None else _kept(after)),
        tasks={name: result for name, (result, _) in asked.items()},
        texts={name: result for name, (result, _) in more.items()},
        tests=tests,
        notes=tuple(_notes(text)),
        provenance={
            "data": text.source.to_json(),
            **({"further text": [other.source.to_json() for other in others]} if others else {}),
            "blocks": len(text),
            "tokens per block": text.length,
            "seed": seed,
            "versions": versions(),
            "machine": machine(),
        },
    )


def verification_text(stack: Stack, source: str | Path) -> TextData:
    """Blocks of the verification split of `source`: as many as there are, up to BLOCKS."""
    if stack.tokenizer is None:
        raise BadData(
            f"text from {source} for {stack.name}, which has no tokenizer",
            expected="token blocks, or a model folder with tokenizer files",
            do="pass TextData made with the model's tokenizer",
        )
    length = min(LENGTH, stack.spec.context)
    whole = text_blocks(source, stack.tokenizer, length=length, split="verification")
    blocks = min(BLOCKS, len(whole))
    return text_blocks(source, stack.tokenizer, length=length, blocks=blocks, split="verification")


def _kept(after: Stack) -> list[int] | None:
    """Which original layer each row comes from, where the stack was made by `apply`; else None."""
    origin: tuple[Stack, Plan] | None = getattr(after, "origin", None)
    return None if origin is None else kept_layers(origin[0].spec, origin[1])


def _measurement(stack: Stack, losses: Losses, found: Probe, seed: int) -> Measurement:
    interval = losses.interval(seed=seed)
    notes = [found.why] if found.why else []
    on_disk = weight_bytes(stack.folder) if stack.folder else None
    if on_disk is not None and on_disk != stack.spec.bytes():
        notes.append(f"{stack.folder} holds {on_disk} bytes of weights, but the layer table says {stack.spec.bytes()}")
    return Measurement(
        bytes=stack.spec.bytes(),
        parameters=stack.spec.parameters(),
        decode_tokens_per_s=found.decode_tokens_per_s,
        prefill_tokens_per_s=found.prefill_tokens_per_s,
        peak_memory_bytes=found.peak_memory_bytes,
        perplexity=math.exp(losses.mean),
        perplexity_interval=(interval.low, interval.high),
        notes=tuple(notes),
        cache_bytes=stack.spec.cache_bytes(),
    )


def _named_task(task: str | MultipleChoice) -> MultipleChoice:
    if isinstance(task, MultipleChoice):
        return task
    from layerwise.data import TASKS

    found: MultipleChoice = TASKS[task]()
    return found


def _text(before: Stack, after: Stack, data: TextData, seed: int, progress: bool) -> tuple[TextResult, Paired]:
    """One more text, as much of it as it takes."""
    stop = Stop(TOLERANCE)
    found = compare_on(before, after, data, stop=stop, progress=progress)
    change, positions = loss_change(found, len(data), stop, seed), found.positions_N
    result = TextResult(found.before.perplexity, found.after.perplexity, change,
                        ratio_interval(found.kl_N, positions, seed=seed),
                        ratio_interval(found.same_N, positions, seed=seed), int(positions.sum()))
    return result, Paired.of(change, TOLERANCE, len(positions), len(data))


def _task(before: Stack, after: Stack, task: MultipleChoice, seed: int, progress: bool) -> tuple[TaskResult, Paired]:
    if before.tokenizer is None:
        raise BadData(
            f"the task {task.name} for {before.name}, which has no tokenizer",
            expected="a model with a tokenizer",
            do="open the model's folder, or leave the task out",
        )
    stop = Stop(POINTS)
    a, b = answers(before, after, task, before.tokenizer, stop, progress)
    change = accuracy_change(a, b, len(task), stop, seed)
    return TaskResult(a.value, b.value, change, task.chance), Paired.of(change, POINTS, len(a.correct_N), len(task))


def _default_tasks(before: Stack, seed: int) -> list[MultipleChoice]:
    """Questions from the default text, of which all options fit the model; none without a tokenizer."""
    tokenizer = before.tokenizer
    if tokenizer is None:
        return []
    from layerwise.data import TASKS

    task: MultipleChoice = TASKS["next-sentence"]()
    encode, room = encoder(tokenizer), before.spec.context
    fit = [item for item in task.items if max(len(encode(item.prompt + option)) for option in item.options) <= room]
    return [replace(task, items=tuple(fit)).take(QUESTIONS, seed)] if len(fit) >= AT_ONCE else []


def _default_texts(before: Stack, first: TextData) -> list[TextData]:
    """One more text of another kind, for a model with a tokenizer."""
    if before.tokenizer is None:
        return []
    return [verification_text(before, name) for name in (OTHER,) if name != first.source.where]


def _notes(data: TextData) -> Iterable[str]:
    if data.source.split == "calibration":
        yield (
            f"the text is the calibration split of {data.source.where}: where the edits were chosen on it, "
            "the result looks better than it is; use split='verification'"
        )
