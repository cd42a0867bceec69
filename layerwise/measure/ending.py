"""The end of a pass at sampled positions: what the head makes of the last hidden states, some at a time.

Shapes: P positions, C hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from layerwise.data.metrics import logit_parts
from layerwise.measure.seen import inner


@dataclass(frozen=True)
class Ending:
    """Last hidden states [P, C], the tokens that follow [P], and the head, from [P, C] to logits [P, V].

    One that `stays`, to be compared with many, keeps its logits where they take no more room than the head itself.
    """

    hidden_PC: Tensor
    targets_P: Tensor
    head: Callable[[Tensor], Tensor]
    vocabulary: int
    stays: bool = False

    def log_p(self) -> Iterator[Tensor]:
        """Log-probabilities in float32, [some of P, V] at a time."""
        keeps = self.stays and len(self.hidden_PC) <= self.hidden_PC.shape[1]
        for logits_PV in self._kept if keeps else self._logits():
            yield torch.log_softmax(logits_PV.float(), -1)

    @cached_property
    def _kept(self) -> list[Tensor]:
        return list(self._logits())

    def _logits(self) -> Iterator[Tensor]:
        return (logits_PV for _, logits_PV in logit_parts(self.hidden_PC, self.head, self.vocabulary))

    @cached_property
    def loss(self) -> float:
        """Mean loss of the tokens that follow, in nats."""
        losses, start = [], 0
        for log_p_PV in self.log_p():
            target_P = self.targets_P[start : start + len(log_p_PV)]
            losses.append(F.nll_loss(log_p_PV, target_P, reduction="none").double())
            start += len(log_p_PV)
        return float(torch.cat(losses).mean())


def kl(original: Ending, changed: Ending) -> float:
    """Mean KL(original || changed) of the predictions, in nats."""
    values = [inner(p.exp(), p - q)
              for p, q in zip(original.log_p(), changed.log_p(), strict=True)]
    return float(torch.cat(values).mean())
