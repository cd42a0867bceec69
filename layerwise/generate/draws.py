"""Several sampled continuations of many prompts at once; a prompt is read once for all its draws.

Shapes: B prompts, D draws of each, T prompt tokens, A new tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from layerwise.generate.sample import Sampling, next_logits
from layerwise.stack.decoder import Caches, DecoderStack


@torch.inference_mode()
def draws(
    stack: DecoderStack, tokens_BT: Tensor, count: int, sampling: Sampling, tokens: int, stop: int,
    generator: torch.Generator,
) -> Tensor:
    """`count` continuations of each prompt by at most `tokens` tokens, int64 [B, D, A].

    Prompts have one length. All go on until every row has said `stop`; what a row says after it means nothing.
    """
    caches: Caches = {}
    logits_RV = next_logits(stack, tokens_BT, caches).repeat_interleave(count, 0)
    caches = {layer: cache.copied(count) for layer, cache in caches.items()}
    said: list[Tensor] = []
    stopped_R = torch.zeros(len(logits_RV), dtype=torch.bool)
    for step in range(tokens):
        if step:
            logits_RV = next_logits(stack, said[-1][:, None], caches)
        said.append(torch.tensor([sampling.draw(row_V, generator) for row_V in logits_RV]))
        stopped_R |= said[-1] == stop
        if bool(stopped_R.all()):
            break
    return torch.stack(said, 1).view(len(tokens_BT), count, -1)
