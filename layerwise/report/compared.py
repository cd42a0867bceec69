"""Two models on the same text and the same questions, item by item, stopping when the difference is clear.

Shapes: B rows, T tokens, V vocabulary, N items.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from layerwise.data.batch import Batch
from layerwise.data.bootstrap import Interval, paired_interval, paired_ratio_interval
from layerwise.data.metrics import Losses, token_kl, token_losses
from layerwise.data.sequential import Stop, unseen
from layerwise.data.tasks import Accuracy, MultipleChoice, accuracy, scorer
from layerwise.data.text import TextData, Tokenizer
from layerwise.errors import BadData, BadOption
from layerwise.measure.progress import Progress
from layerwise.stack.base import Stack

AT_ONCE = 12
"""Questions between two looks."""


@dataclass(frozen=True)
class Compared:
    """Both models on the same blocks: losses of each, divergence and agreement summed over each block."""

    before: Losses
    after: Losses
    kl_N: NDArray[np.float64]
    same_N: NDArray[np.float64]
    positions_N: NDArray[np.float64]

    @property
    def differences(self) -> NDArray[np.float64]:
        """Loss after minus before of every block, nats per token, [N]."""
        difference_N: NDArray[np.float64] = (self.after.sum_N - self.before.sum_N) / self.before.tokens_N
        return difference_N


@torch.inference_mode()
def compare_on(before: Stack, after: Stack, data: TextData, *, stop: Stop | None = None,
               progress: bool = False) -> Compared:
    """Run both models over `data`, one block at a time; with `stop`, no further than it takes.

    Raises BadData if a loss is not finite.
    """
    first, second = predictions_of(before), predictions_of(after)
    sums: list[list[float]] = []
    with Progress(f"predictions before and after, {data.name}", len(data), progress) as bar:
        for batch in data.batches(1):
            sums.append(_block(first(batch.tokens_BT), second(batch.tokens_BT), batch))
            bar.step()
            difference_N = _columns(sums).differences
            if stop and np.isfinite(difference_N).all() and stop.early_interval(difference_N, None, len(data)):
                break
    columns = np.array(sums, dtype=np.float64).T
    _check_finite(columns[:3], data, before.name)
    return _columns(sums)


def loss_change(compared: Compared, most: int, stop: Stop, seed: int) -> Interval:
    """Log-perplexity after minus before, nats per token, with an interval that stopping early does not spoil."""
    settled = stop.early_interval(compared.differences, None, most)
    if settled:
        return settled
    before, after = compared.before, compared.after
    last = paired_ratio_interval((before.sum_N, before.tokens_N), (after.sum_N, after.tokens_N), level=stop.last_level,
                                 seed=seed)
    return Interval(last.low, last.value, last.high, stop.level)


def answers(before: Stack, after: Stack, task: MultipleChoice, tokenizer: Tokenizer, stop: Stop,
            progress: bool = False) -> tuple[Accuracy, Accuracy]:
    """Both models on the same questions, in order, until the difference is clear or there are no more."""
    scores = [scorer(predictions_of(stack)) for stack in (before, after)]
    found: list[tuple[Accuracy, Accuracy]] = []
    with Progress(f"questions, {task.name}", len(task), progress) as bar:
        for start in range(0, len(task), AT_ONCE):
            part = replace(task, items=task.items[start : start + AT_ONCE])
            a, b = (accuracy(score, part, tokenizer) for score in scores)
            found.append((a, b))
            bar.step(len(part))
            both = _joined([pair[0] for pair in found]), _joined([pair[1] for pair in found])
            if stop.early_interval(both[1].correct_N - both[0].correct_N, (-1.0, 1.0), len(task)):
                break
    return both


def accuracy_change(a: Accuracy, b: Accuracy, most: int, stop: Stop, seed: int) -> Interval:
    """Accuracy after minus before, with an interval that stopping early does not spoil.

    Where all answers are alike, it is as wide as what may have stayed unseen.
    """
    difference_N = b.correct_N - a.correct_N
    settled = stop.early_interval(difference_N, (-1.0, 1.0), most)
    if settled:
        return settled
    if (difference_N == difference_N[0]).all():
        value, room = float(difference_N[0]), unseen(len(difference_N), stop.last_level)
        return Interval(max(value - room, -1.0), value, min(value + room, 1.0), stop.level)
    last = paired_interval(a.correct_N, b.correct_N, level=stop.last_level, seed=seed)
    return Interval(last.low, last.value, last.high, stop.level)


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


def _columns(sums: list[list[float]]) -> Compared:
    columns = np.array(sums, dtype=np.float64).T
    return Compared(Losses(columns[0], columns[4]), Losses(columns[1], columns[4]), columns[2], columns[3], columns[5])


def _joined(parts: list[Accuracy]) -> Accuracy:
    return Accuracy(np.concatenate([part.correct_N for part in parts]),
                    np.concatenate([part.normalised_N for part in parts]))


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
