"""Following chosen tokens through the layers: their rank and probability in the lens.

At every depth the residual stream is read through the model's final norm and head; depth l is what enters
layer l, and the last depth is the model's own prediction. Use `data.prompts.single_token` for the ids: it
refuses an answer that the tokenizer splits.

Shapes: D depths (layers + 1), B rows, T tokens, K tracked tokens, C hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from layerwise.data.batch import check_tokens
from layerwise.stack.base import Stack, State


@dataclass(frozen=True)
class Track:
    """`rank_DBK` counts the tokens that are likelier (0 is the top), `log_p_DBK` is in nats."""

    rank_DBK: Tensor
    log_p_DBK: Tensor


@torch.inference_mode()
def track(stack: Stack, tokens_BT: Tensor, tracked_BK: Tensor, places_B: Tensor | None = None,
          mask_BT: Tensor | None = None) -> Track:
    """Rank and log-probability of `tracked_BK` as the token after `places_B` (default: the last) at every depth.

    Cost: one forward, and the head once a row and depth. Raises BadData for ids outside the vocabulary.
    """
    check_tokens(tracked_BK, stack.spec.vocabulary)
    readings = [_reading(log_p_BV, tracked_BK) for log_p_BV in lens(stack, tokens_BT, places_B, mask_BT)]
    return Track(torch.stack([rank for rank, _ in readings]), torch.stack([log_p for _, log_p in readings]))


def lens(stack: Stack, tokens_BT: Tensor, places_B: Tensor | None = None,
         mask_BT: Tensor | None = None) -> Iterator[Tensor]:
    """The lens prediction after `places_B` (default: the last token) at every depth: log-probabilities [B, V]."""
    state = stack.start(tokens_BT) if mask_BT is None else stack.start(tokens_BT, mask_BT)
    places_B = torch.full((len(tokens_BT),), tokens_BT.shape[1] - 1) if places_B is None else places_B
    yield read(stack, state, places_B)
    while state.layer < len(stack):
        state = stack.run(state, slice(state.layer, state.layer + 1))
        yield read(stack, state, places_B)


def read(stack: Stack, state: State, places_B: Tensor) -> Tensor:
    """What `state` would predict at one place of each row if it were the last: log-probabilities [B, V]."""
    rows_1BC = state.hidden[torch.arange(len(places_B)), places_B][None]
    logits_BV: Tensor = stack.finish(state.moved(rows_1BC, len(stack)))[0]
    return logits_BV.float().log_softmax(-1)


def _reading(log_p_BV: Tensor, tracked_BK: Tensor) -> tuple[Tensor, Tensor]:
    log_p_BK = log_p_BV.gather(1, tracked_BK.to(log_p_BV.device))
    rank_BK = (log_p_BV[:, None, :] > log_p_BK[:, :, None]).sum(-1)
    return rank_BK, log_p_BK
