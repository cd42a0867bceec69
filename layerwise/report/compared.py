"""Two models on the same text and the same questions, item by item, stopping when the difference is clear.

Logits exist for some positions at a time only: those of whole blocks would take more memory than many a model.

Shapes: B rows, T tokens, P positions, C hidden width, V vocabulary, N items.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from layerwise.data.batch import Batch
from layerwise.data.bootstrap import Interval, paired_interval, paired_ratio_interval
from layerwise.data.metrics import Losses, hidden_losses, logit_parts
from layerwise.data.sequential import Stop, unseen
from layerwise.data.tasks import Accuracy, MultipleChoice, accuracy, loss_scorer
from layerwise.data.text import TextData, Tokenizer
from layerwise.errors import BadData, BadOption
from layerwise.io.pages import trim
from layerwise.measure.progress import Progress
from layerwise.stack.base import Stack
from layerwise.stack.decoder import DecoderStack

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
    sums: list[list[float]] = []
    trim()
    with Progress(f"predictions before and after, {data.name}", len(data), progress) as bar:
        for batch in data.batches(1):
            sums.append(_block(ended(before, batch.tokens_BT), ended(after, batch.tokens_BT), batch))
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
    scores = [loss_scorer(partial(_losses, stack)) for stack in (before, after)]
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


@dataclass(frozen=True)
class Ended:
    """What enters the head at every position, [B, T, C], and the head, from [P, C] to logits [P, V]."""

    hidden_BTC: Tensor
    head: Callable[[Tensor], Tensor]
    vocabulary: int


def ended(stack: Stack, tokens_BT: Tensor) -> Ended:
    """A language model after its last layer; of one that is not a decoder, its logits, and nothing to do.

    Raises BadOption for a model that returns something else.
    """
    if isinstance(stack, DecoderStack):
        state = stack.run(stack.start(tokens_BT))
        return Ended(state.hidden, lambda rows_PC: stack.finish(state.moved(rows_PC[None], len(stack)))[0],
                     stack.spec.vocabulary)
    out: Any = stack(tokens_BT)
    found = getattr(out, "logits", out)
    if not isinstance(found, Tensor) or found.ndim != 3 or found.shape[:2] != tokens_BT.shape:
        raise BadOption(
            f"{stack.name}, which returns {type(out).__name__}",
            expected="a model that returns logits [batch, tokens, vocabulary]",
            do="verify language models; compare the outputs of other modules directly",
        )
    return Ended(found, lambda rows_PV: rows_PV, found.shape[-1])


def _losses(stack: Stack, tokens_BT: Tensor) -> Tensor:
    found = ended(stack, tokens_BT)
    losses_BT = hidden_losses(found.hidden_BTC, tokens_BT, found.head, found.vocabulary)
    trim()  # every batch has another length, and what is kept of each adds up
    return losses_BT


def _columns(sums: list[list[float]]) -> Compared:
    columns = np.array(sums, dtype=np.float64).T
    return Compared(Losses(columns[0], columns[4]), Losses(columns[1], columns[4]), columns[2], columns[3], columns[5])


def _joined(parts: list[Accuracy]) -> Accuracy:
    return Accuracy(np.concatenate([part.correct_N for part in parts]),
                    np.concatenate([part.normalised_N for part in parts]))


def _block(before: Ended, after: Ended, batch: Batch) -> list[float]:
    """Summed losses before and after, divergence, agreement; predicted tokens, and positions."""
    tokens_BT, mask_BT = batch.tokens_BT, batch.mask_BT
    mask_BT = torch.ones_like(tokens_BT, dtype=torch.bool) if mask_BT is None else mask_BT.bool()
    next_P, followed_P = (F.pad(of_BT[:, 1:], (0, 1)).flatten() for of_BT in (tokens_BT, mask_BT))
    mask_P, sums = mask_BT.flatten(), torch.zeros(4, dtype=torch.float64)
    parts = (logit_parts(end.hidden_BTC.flatten(0, 1), end.head, end.vocabulary) for end in (before, after))
    for (part, before_PV), (_, after_PV) in zip(*parts, strict=True):
        old_PV, new_PV = (F.log_softmax(logits_PV, -1, dtype=torch.float32) for logits_PV in (before_PV, after_PV))
        target_P, followed, real = (values_P[part].to(old_PV.device) for values_P in (next_P, followed_P, mask_P))
        found = [(F.nll_loss(old_PV, target_P, reduction="none"), followed),
                 (F.nll_loss(new_PV, target_P, reduction="none"), followed),
                 (F.kl_div(new_PV, old_PV, reduction="none", log_target=True).sum(-1), real),
                 (old_PV.argmax(-1) == new_PV.argmax(-1), real)]
        sums += torch.stack([values_P.double().where(counted_P, 0.0).sum() for values_P, counted_P in found]).cpu()
    return [*sums.tolist(), float(followed_P.sum()), float(mask_P.sum())]


def _check_finite(columns: NDArray[np.float64], data: TextData, name: str) -> None:
    bad = np.flatnonzero(~np.isfinite(columns).all(0))
    if len(bad):
        raise BadData(
            f"losses that are not finite on block {bad[0]} of {data.name}, before or after {name} was edited",
            expected="finite losses",
            do="check the weights with `layerwise doctor`",
        )
