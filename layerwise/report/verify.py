"""`verify`: run a model and its edited copy on the same text, and say what changed and how sure that is.

Shapes: B rows, T tokens, V vocabulary, N blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from layerwise.allocate.plan import Plan
from layerwise.data.batch import Batch
from layerwise.data.bootstrap import paired_ratio_interval, ratio_interval
from layerwise.data.metrics import Losses, token_kl, token_losses
from layerwise.data.tasks import MultipleChoice, accuracy, scorer
from layerwise.data.text import TextData, text_blocks
from layerwise.errors import BadData, BadOption
from layerwise.measure.progress import Progress
from layerwise.report.files import weight_bytes
from layerwise.report.layers import kept_layers, layer_changes
from layerwise.report.machine import machine, versions
from layerwise.report.probe import Probe, probe
from layerwise.report.report import Measurement, Report, TaskResult
from layerwise.stack.base import Stack

__all__ = ["Measurement", "Report", "TaskResult", "verify"]

BLOCKS, LENGTH = 24, 512


@dataclass(frozen=True)
class Compared:
    """Both models on the same blocks: losses of each, divergence and agreement summed over each block."""

    before: Losses
    after: Losses
    kl_N: NDArray[np.float64]
    same_N: NDArray[np.float64]
    positions_N: NDArray[np.float64]


def verify(
    before: Stack,
    after: Stack,
    data: TextData | str | Path,
    *,
    tasks: Iterable[str | MultipleChoice] = (),
    seed: int = 0,
    kept: Sequence[int] | None = None,
    speeds: bool = True,
    progress: bool = False,
) -> Report:
    """Compare two models on the same text, and measure size, speed and memory of each.

    `data` should be text that had no part in making `after`: the verification split of a source, which is
    taken where `data` names a source. `tasks` are multiple-choice tasks or their names. `kept` says which
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
    compared = compare_on(before, after, text, progress=progress)
    probes = [probe(stack) if speeds else Probe(None, None, None, "not asked for") for stack in (before, after)]
    positions = compared.positions_N
    return Report(
        model=before.name,
        before=_measurement(before, compared.before, probes[0], seed),
        after=_measurement(after, compared.after, probes[1], seed),
        log_perplexity_change=paired_ratio_interval(
            (compared.before.sum_N, compared.before.tokens_N),
            (compared.after.sum_N, compared.after.tokens_N),
            seed=seed,
        ),
        kl=ratio_interval(compared.kl_N, positions, seed=seed),
        agreement=ratio_interval(compared.same_N, positions, seed=seed),
        layers=layer_changes(before.spec, after.spec, kept if kept is not None else _kept(after)),
        tasks={task.name: _task(before, after, task, seed) for task in map(_named_task, tasks)},
        notes=tuple(_notes(text)),
        provenance={
            "data": text.source.to_json(),
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


def predictions_of(stack: Stack) -> Callable[[Tensor], Tensor]:
    """The stack as a function from tokens [B, T] to logits [B, T, V]."""

    def logits(tokens_BT: Tensor) -> Tensor:
        out: Any = stack(tokens_BT)
        found = getattr(out, "logits", out)
        if not isinstance(found, Tensor) or found.ndim != 3 or found.shape[:2] != tokens_BT.shape:
            raise BadOption(
                f"{stack.name}, which returns {type(out).__name__}",
                expected="a model that returns logits [batch, tokens, vocabulary]",
                do="verify language models; compare the outputs of other modules directly",
            )
        return found

    return logits


@torch.inference_mode()
def compare_on(before: Stack, after: Stack, data: TextData, *, progress: bool = False) -> Compared:
    """Run both models over `data`, one block at a time. Raises BadData if a loss is not finite."""
    first, second = predictions_of(before), predictions_of(after)
    sums: list[list[float]] = []
    with Progress("predictions before and after", len(data), progress) as bar:
        for batch in data.batches(1):
            sums.append(_block(first(batch.tokens_BT), second(batch.tokens_BT), batch))
            bar.step()
    columns = np.array(sums, dtype=np.float64).T
    _check_finite(columns[:3], data, before.name)
    return Compared(Losses(columns[0], columns[4]), Losses(columns[1], columns[4]), columns[2], columns[3], columns[5])


def _kept(after: Stack) -> list[int] | None:
    """Which original layer each row comes from, where the stack was made by `apply`; else None."""
    origin: tuple[Stack, Plan] | None = getattr(after, "origin", None)
    return None if origin is None else kept_layers(origin[0].spec, origin[1])


def _block(a_BTV: Tensor, b_BTV: Tensor, batch: Batch) -> list[float]:
    """Summed losses before and after, divergence, agreement; predicted tokens, and positions."""
    tokens_BT = batch.tokens_BT
    mask_BT = torch.ones_like(tokens_BT, dtype=torch.bool) if batch.mask_BT is None else batch.mask_BT
    return [
        _sum(token_losses(a_BTV, tokens_BT), mask_BT[:, 1:]),
        _sum(token_losses(b_BTV, tokens_BT), mask_BT[:, 1:]),
        _sum(token_kl(a_BTV, b_BTV), mask_BT),
        _sum((a_BTV.argmax(-1) == b_BTV.argmax(-1)).float(), mask_BT),
        float(mask_BT[:, 1:].sum()),
        float(mask_BT.sum()),
    ]


def _sum(values_BT: Tensor, mask_BT: Tensor) -> float:
    return float(values_BT.cpu().double().where(mask_BT, 0.0).sum())


def _check_finite(columns: NDArray[np.float64], data: TextData, name: str) -> None:
    bad = np.flatnonzero(~np.isfinite(columns).all(0))
    if len(bad):
        raise BadData(
            f"losses that are not finite on block {bad[0]} of {data.name}, before or after {name} was edited",
            expected="finite losses",
            do="check the weights with `layerwise doctor`",
        )


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
    )


def _named_task(task: str | MultipleChoice) -> MultipleChoice:
    if isinstance(task, MultipleChoice):
        return task
    from layerwise.data import TASKS

    found: MultipleChoice = TASKS[task]()
    return found


def _task(before: Stack, after: Stack, task: MultipleChoice, seed: int) -> TaskResult:
    if before.tokenizer is None:
        raise BadData(
            f"the task {task.name} for {before.name}, which has no tokenizer",
            expected="a model with a tokenizer",
            do="open the model's folder, or leave the task out",
        )
    a = accuracy(scorer(predictions_of(before)), task, before.tokenizer)
    b = accuracy(scorer(predictions_of(after)), task, before.tokenizer)
    return TaskResult(a.value, b.value, a.change(b, seed=seed), task.chance)


def _notes(data: TextData) -> Iterable[str]:
    if data.source.split == "calibration":
        yield (
            f"the text is the calibration split of {data.source.where}: where the edits were chosen on it, "
            "the result looks better than it is; use split='verification'"
        )
