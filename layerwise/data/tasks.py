"""Multiple-choice tasks: which of several continuations does the model find likeliest?

Shapes: N items, B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from layerwise.data.batch import common_prefix, pad
from layerwise.data.bootstrap import Interval, interval, paired_interval
from layerwise.data.metrics import token_losses
from layerwise.data.text import Tokenizer, encoder, frame
from layerwise.errors import BadData

Pair = tuple[list[int], list[int]]
Score = Callable[[list[Pair]], Sequence[float]]

TOKENS = 2**10
"""Tokens of a batch, filling included."""


@dataclass(frozen=True)
class ChoiceItem:
    """A prompt, the options that may follow it (each with its leading space), the index of the right one."""

    prompt: str
    options: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class MultipleChoice:
    """A task: its items, and where they came from."""

    name: str
    items: tuple[ChoiceItem, ...]
    where: str

    def __post_init__(self) -> None:
        if not self.items:
            raise BadData(
                f"the task {self.name} from {self.where} has no items",
                expected="at least one question",
                do="check the file",
            )
        for number, item in enumerate(self.items):
            if len(item.options) < 2 or not 0 <= item.answer < len(item.options) or not all(item.options):
                raise BadData(
                    f"item {number} of {self.name}: {len(item.options)} options, answer {item.answer}",
                    expected="two or more non-empty options and the index of the right one",
                    do="repair the item",
                )

    def __len__(self) -> int:
        return len(self.items)

    @property
    def chance(self) -> float:
        """Accuracy of guessing."""
        return float(np.mean([1 / len(item.options) for item in self.items]))

    def take(self, count: int, seed: int | None = None) -> MultipleChoice:
        """The first `count` items, or that many drawn with `seed`, in order."""
        order = torch.arange(len(self))
        if seed is not None:
            order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        chosen = sorted(order[:count].tolist())
        return dataclasses.replace(self, items=tuple(self.items[index] for index in chosen))


@dataclass(frozen=True)
class Accuracy:
    """1 where an item is right, else 0, float64 [N]: by likelihood, and by likelihood per character."""

    correct_N: NDArray[np.float64]
    normalised_N: NDArray[np.float64]

    @property
    def value(self) -> float:
        return float(self.correct_N.mean())

    @property
    def normalised(self) -> float:
        return float(self.normalised_N.mean())

    def interval(self, level: float = 0.95, seed: int = 0) -> Interval:
        return interval(self.correct_N, level=level, seed=seed)

    def change(self, after: Accuracy, level: float = 0.95, seed: int = 0) -> Interval:
        """Accuracy of `after` minus this one's, on the same items."""
        return paired_interval(self.correct_N, after.correct_N, level=level, seed=seed)


def accuracy(score: Score, task: MultipleChoice, tokenizer: Tokenizer) -> Accuracy:
    """How often the right option scores highest; a tie goes to the earlier option.

    `score` gives the log-likelihood (nats) of each continuation after its context; see `scorer`.
    """
    pairs = [pair for item in task.items for pair in encode(item, tokenizer)]
    scores = np.asarray(score(pairs), dtype=np.float64)
    if scores.shape != (len(pairs),) or not np.isfinite(scores).all():
        raise BadData(
            f"scores of shape {scores.shape} for {len(pairs)} options",
            expected="one finite score an option",
            do="check the model's weights, or compute in float32",
        )
    correct, normalised, start = [], [], 0
    for item in task.items:
        own = scores[start : start + len(item.options)]
        lengths = np.array([len(option) for option in item.options])
        correct.append(own.argmax() == item.answer)
        normalised.append((own / lengths).argmax() == item.answer)
        start += len(item.options)
    return Accuracy(np.array(correct, dtype=np.float64), np.array(normalised, dtype=np.float64))


def encode(item: ChoiceItem, tokenizer: Tokenizer) -> list[Pair]:
    """(context, continuation) token ids of every option, cut from the tokens of both together.

    The context ends where the prompt's own tokens and those of the options part, at the latest.
    """
    framed = encoder(tokenizer)
    _, after = frame(framed)

    def ids(text: str) -> list[int]:
        found = framed(text)
        return found[: len(found) - len(after)]

    whole = [ids(item.prompt + option) for option in item.options]
    shared = min(common_prefix([ids(item.prompt), *whole]), *(len(both) - 1 for both in whole))
    if shared < 1:
        raise BadData(
            f"the prompt {item.prompt!r} has no tokens",
            expected="a context of at least one token",
            do="put some text before the options",
        )
    return [(both[:shared], both[shared:]) for both in whole]


def scorer(logits: Callable[[Tensor], Tensor], tokens: int = TOKENS) -> Score:
    """A score function from `logits`, tokens [B, T] to logits [B, T, V], of a causal model."""
    return loss_scorer(lambda tokens_BT: token_losses(logits(tokens_BT), tokens_BT), tokens)


def loss_scorer(losses: Callable[[Tensor], Tensor], tokens: int = TOKENS) -> Score:
    """A score function from `losses`, tokens [B, T] to token losses [B, T-1], of a causal model.

    Pairs run sorted by length, filled up on the right: as many at a time as make about so many tokens.
    """

    def score(pairs: list[Pair]) -> list[float]:
        lengths = [len(context) + len(continuation) for context, continuation in pairs]
        order = sorted(range(len(pairs)), key=lambda index: -lengths[index])
        found = [0.0] * len(pairs)
        while order:
            rows = max(1, tokens // lengths[order[0]])
            part, order = order[:rows], order[rows:]
            tokens_BT = pad([pairs[index][0] + pairs[index][1] for index in part]).tokens_BT
            with torch.inference_mode():
                losses_BT = losses(tokens_BT).double().cpu()
            for row, index in enumerate(part):
                first = len(pairs[index][0]) - 1
                found[index] = -float(losses_BT[row, first : lengths[index] - 1].sum())
        return found

    return score
