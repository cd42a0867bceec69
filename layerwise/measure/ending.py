"""The end of a pass at sampled positions: what the head makes of the last hidden states, some at a time.

Shapes: P positions, C hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from layerwise.measure.seen import inner

CHUNK = 2**22
"""Logits made at once, each of which takes 16 bytes or more while two models are compared."""

KEPT = 2**23
"""Logits of the original that are kept, so that they are made once for all changes."""


@dataclass(frozen=True)
class Ending:
    """Last hidden states [P, C], the tokens that follow [P], and the head, from [P, C] to logits [P, V]."""

    hidden_PC: Tensor
    targets_P: Tensor
    head: Callable[[Tensor], Tensor]
    vocabulary: int

    def log_p(self) -> Iterable[Tensor]:
        """Log-probabilities in float32, [some of P, V] at a time; kept where they are few."""
        return self._few if len(self.hidden_PC) * self.vocabulary <= KEPT else self._chunks()

    @cached_property
    def _few(self) -> list[Tensor]:
        return list(self._chunks())

    def _chunks(self) -> Iterator[Tensor]:
        for rows_PC in self.hidden_PC.split(max(1, CHUNK // self.vocabulary)):
            yield torch.log_softmax(self.head(rows_PC).float(), -1)

    @cached_property
    def loss(self) -> float:
        """Mean loss of the tokens that follow, in nats."""
        targets = self.targets_P.split(max(1, CHUNK // self.vocabulary))
        losses = [F.nll_loss(log_p_PV, target_P, reduction="none").double()
                  for log_p_PV, target_P in zip(self.log_p(), targets, strict=True)]
        return float(torch.cat(losses).mean())


def kl(original: Ending, changed: Ending) -> float:
    """Mean KL(original || changed) of the predictions, in nats."""
    values = [inner(p.exp(), p - q)
              for p, q in zip(original.log_p(), changed.log_p(), strict=True)]
    return float(torch.cat(values).mean())
