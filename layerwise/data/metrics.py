"""How well a language model predicts text, and how far two models' predictions lie apart.

Losses and divergences are in nats per token. Whatever the vocabulary, no more than `LOGITS` logits are made at once,
and no more than `CHUNK` of them held in float32.

Shapes: B rows, T tokens, V vocabulary, C hidden width, N blocks, P positions (rows and tokens flattened).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from layerwise.data.batch import slices
from layerwise.data.bootstrap import Interval, paired_ratio_interval, ratio_interval
from layerwise.data.text import TextData
from layerwise.errors import BadData

CHUNK = 2**22

LOGITS = 2**24
"""Many, since a head that is packed is unpacked for each part."""


def token_losses(logits_BTV: Tensor, tokens_BT: Tensor) -> Tensor:
    """Loss of every token but a row's first, given the tokens before it: [B, T-1] float32."""
    return hidden_losses(logits_BTV, tokens_BT, lambda rows_PV: rows_PV, logits_BTV.shape[-1])


def hidden_losses(
    hidden_BTC: Tensor, tokens_BT: Tensor, head: Callable[[Tensor], Tensor], vocabulary: int
) -> Tensor:
    """As `token_losses`, from what enters the head: logits exist only for a few positions at a time.

    `head` maps [P, C] to [P, V]. Returns [B, T-1] float32.
    """
    rows_PC = hidden_BTC.flatten(0, 1)
    targets_P = F.pad(tokens_BT[:, 1:], (0, 1)).flatten().to(hidden_BTC.device)
    losses = [F.cross_entropy(logits_PV.float(), targets_P[part], reduction="none")
              for part, logits_PV in logit_parts(rows_PC, head, vocabulary)]
    return torch.cat(losses).view(tokens_BT.shape)[:, :-1]


def logit_parts(rows_PC: Tensor, head: Callable[[Tensor], Tensor], vocabulary: int) -> Iterator[tuple[slice, Tensor]]:
    """Logits of all rows in their order, [few, V] in the dtype of the model, and which rows these are."""
    for whole in slices(len(rows_PC), max(1, LOGITS // vocabulary)):
        logits_PV = head(rows_PC[whole])
        for part in slices(len(logits_PV), max(1, CHUNK // vocabulary)):
            yield slice(whole.start + part.start, whole.start + part.stop), logits_PV[part]


@dataclass(frozen=True)
class Losses:
    """Summed loss and number of predicted tokens of each block, float64 [N]."""

    sum_N: NDArray[np.float64]
    tokens_N: NDArray[np.float64]

    @property
    def mean(self) -> float:
        """Nats per token over all blocks."""
        return float(self.sum_N.sum() / self.tokens_N.sum())

    @property
    def perplexity(self) -> float:
        return math.exp(self.mean)

    def interval(self, level: float = 0.95, seed: int = 0) -> Interval:
        """Perplexity with a confidence interval, blocks resampled."""
        return ratio_interval(self.sum_N, self.tokens_N, level=level, seed=seed).map(math.exp)

    def change(self, after: Losses, level: float = 0.95, seed: int = 0) -> Interval:
        """Perplexity of `after` divided by this one's, the same blocks resampled for both."""
        return paired_ratio_interval(
            (self.sum_N, self.tokens_N), (after.sum_N, after.tokens_N), level=level, seed=seed
        ).map(math.exp)


def block_losses(losses: Callable[[Tensor], Tensor], data: TextData, size: int = 4) -> Losses:
    """Losses of every block; `losses` maps tokens [B, T] to token losses [B, T-1].

    Raises BadData if a loss is not finite, naming the block.
    """
    sums, counts = [], []
    with torch.inference_mode():
        for batch in data.batches(size):
            losses_BT = losses(batch.tokens_BT).double().cpu()
            real_BT = torch.ones_like(losses_BT) if batch.mask_BT is None else batch.mask_BT[:, 1:].double()
            sums.append(losses_BT.where(real_BT.bool(), 0.0).sum(1))
            counts.append(real_BT.sum(1))
    result = Losses(torch.cat(sums).numpy(), torch.cat(counts).numpy())
    if not np.isfinite(result.sum_N).all():
        block = int(np.flatnonzero(~np.isfinite(result.sum_N))[0])
        raise BadData(
            f"the model's loss on block {block} of {data.name} is {result.sum_N[block]}",
            expected="finite losses",
            do="check the model's weights, or compute in float32",
        )
    return result


def perplexity(logits: Callable[[Tensor], Tensor], data: TextData, size: int = 4) -> Losses:
    """Losses of a model given as `logits`, from tokens [B, T] to logits [B, T, V]; see `.perplexity`."""
    return block_losses(lambda tokens_BT: token_losses(logits(tokens_BT), tokens_BT), data, size)


def token_kl(reference_BTV: Tensor, logits_BTV: Tensor) -> Tensor:
    """KL(reference || model) of the two predictions at every position, [B, T] float32."""
    old_PV, new_PV = reference_BTV.flatten(0, -2), logits_BTV.flatten(0, -2)
    parts = []
    for part in slices(len(old_PV), max(1, CHUNK // old_PV.shape[-1])):
        old, new = (F.log_softmax(rows_PV[part], -1, dtype=torch.float32) for rows_PV in (old_PV, new_PV))
        parts.append(F.kl_div(new, old, reduction="none", log_target=True).sum(-1))
    return torch.cat(parts).view(reference_BTV.shape[:-1])


def kl_divergence(reference_BTV: Tensor, logits_BTV: Tensor, mask_BT: Tensor | None = None) -> float:
    """Mean of `token_kl` over the positions of `mask_BT`, or all."""
    return _mean(token_kl(reference_BTV, logits_BTV), mask_BT)


def agreement(reference_BTV: Tensor, logits_BTV: Tensor, mask_BT: Tensor | None = None) -> float:
    """Share of positions at which both predict the same token first."""
    return _mean((reference_BTV.argmax(-1) == logits_BTV.argmax(-1)).float(), mask_BT)


def _mean(values_BT: Tensor, mask_BT: Tensor | None) -> float:
    return float((values_BT if mask_BT is None else values_BT[mask_BT]).double().mean())
