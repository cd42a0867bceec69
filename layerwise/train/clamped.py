"""Constrained fine-tuning: teach one fact to one matrix whose entries may hardly move.

Only the last feed-forward matrix of one layer learns, with Adam on -log p(answer) after the prompt; after
every step each entry is clamped to within `largest` of where it began, and a fact stops once its loss was
below `enough` for `patience` steps in all. Source: arXiv 2301.04213 and its public code.

Several facts learn at once, each in a matrix of its own, since all of it is elementwise in the facts.

Shapes: N facts, T tokens, C hidden width, I inner width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from layerwise.data.batch import pad
from layerwise.stack.decoder import DecoderStack
from layerwise.transform.wishes import last_matrix


@dataclass(frozen=True)
class Clamp:
    """How far and how fast; the defaults are those for one layer."""

    largest: float = 1e-4
    steps: int = 25
    rate: float = 5e-4
    enough: float = 0.01
    patience: int = 5


def clamped(stack: DecoderStack, layer: int, rows: Sequence[Sequence[int]], answers: Sequence[int],
            clamp: Clamp) -> Tensor:
    """One matrix for each fact, [N, C, I]: the last one of `layer` after learning `answers[n]` after `rows[n]`.

    Memory: four matrices a fact. `stack` is left as it was. Raises BadOption as `last_matrix`.
    """
    weight_CI = last_matrix(stack, layer).detach()
    batch = pad(rows)
    last_N = torch.tensor([len(row) - 1 for row in rows])
    answer_N = torch.tensor(list(answers))
    with torch.no_grad():
        entering = stack.run(stack.start(batch.tokens_BT), slice(0, layer))
        with stack.capture("neurons", layers=range(layer, layer + 1)) as seen:
            stack.run(entering, slice(layer, layer + 1))
    neurons_NTI = seen[layer, "neurons"].clone()
    matrix_NCI = weight_CI.expand(len(rows), -1, -1).clone().requires_grad_(True)
    optimizer = torch.optim.Adam([matrix_NCI], lr=clamp.rate)
    quiet_N = torch.zeros(len(rows), dtype=torch.int64)
    for _ in range(clamp.steps):
        moved_NTC = neurons_NTI @ (matrix_NCI - weight_CI).transpose(1, 2)
        with stack.edit(layer, "feed_forward", lambda x_NTC, moved_NTC=moved_NTC: x_NTC + moved_NTC):  # type: ignore[misc]
            final = stack.run(entering)
        rows_1NC = final.hidden[torch.arange(len(rows)), last_N][None]
        logits_NV: Tensor = stack.finish(final.moved(rows_1NC, final.layer))[0]
        loss_N = F.cross_entropy(logits_NV.float(), answer_N, reduction="none")
        quiet_N += loss_N.detach() < clamp.enough
        if bool((quiet_N >= clamp.patience).all()):
            break
        optimizer.zero_grad()
        loss_N.sum().backward()
        kept_NCI = matrix_NCI.detach().clone()
        optimizer.step()
        with torch.no_grad():
            matrix_NCI.copy_(torch.clamp(matrix_NCI, weight_CI - clamp.largest, weight_CI + clamp.largest))
            matrix_NCI[quiet_N >= clamp.patience] = kept_NCI[quiet_N >= clamp.patience]
    return matrix_NCI.detach()
