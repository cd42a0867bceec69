"""How well an edit of one fact worked, on a scale from 0 to 1, from probabilities of the new answer.

    rewrite       max(0, 1 - (1 - q) / (1 - p))         the edited prompt; other wordings in the same way
    erasure       max(0, (p - q) / p)                   where the answer was to be unlearnt
    neighbourhood 1 - |q - p| / (0.5 + |p - 0.5|)       other subjects, whose answers should stay

p is the probability before the edit and q after it. Source: arXiv 2301.04213.

Shapes: B prompts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from layerwise.data.batch import pad
from layerwise.stack.base import Stack, State


def rewrite(before: Tensor, after: Tensor) -> Tensor:
    """Share of the missing probability that the edit gained; zero where it lost some."""
    return (1 - (1 - after) / (1 - before).clamp(min=1e-9)).clamp(min=0)


def erasure(before: Tensor, after: Tensor) -> Tensor:
    """Share of the probability that the edit took away; zero where it added some."""
    return ((before - after) / before.clamp(min=1e-9)).clamp(min=0)


def neighbourhood(before: Tensor, after: Tensor) -> Tensor:
    """One where nothing moved, zero where it moved as far as it could."""
    return 1 - (after - before).abs() / (0.5 + (before - 0.5).abs())


class Prompts:
    """Prompts that stand before a layer, so that several edits of later layers read them without starting over.

    `answers_B` are the tokens whose probability is asked for, one for each prompt.
    """

    def __init__(self, stack: Stack, rows: Sequence[Sequence[int]], answers: Sequence[int]) -> None:
        batch = pad(rows)
        self.stack, self.answers_B = stack, torch.tensor(list(answers))
        self.last_B = torch.tensor([len(row) - 1 for row in rows])
        self.state: State = stack.start(batch.tokens_BT)

    @torch.inference_mode()
    def advance(self, layer: int) -> None:
        """Move on to where the prompts enter `layer`, which must not lie behind."""
        self.state = self.stack.run(self.state, slice(self.state.layer, layer))

    @torch.inference_mode()
    def chances(self, stack: Stack | None = None) -> Tensor:
        """Probability of each answer as the next token, float32 [B], with `stack` from here on if given."""
        stack = stack or self.stack
        final = stack.run(self.state)
        rows_1BC = final.hidden[torch.arange(len(self.last_B)), self.last_B][None]
        logits_BV: Tensor = stack.finish(final.moved(rows_1BC, final.layer))[0]
        chances_B: Tensor = logits_BV.float().softmax(-1).gather(1, self.answers_B[:, None].to(logits_BV.device))[:, 0]
        return chances_B
