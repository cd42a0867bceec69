"""Residual erasure: what an answer loses when one token's state at one depth is replaced by a mean state.

    E[d, t] = max over answer tokens of |p - p'|

p is the predicted distribution, p' that with the state of token t at depth d replaced by the mean of that depth
over other texts. It shows until which depth a token is still read. Source: arXiv 2505.13898. Cost: tokens x
layers^2 / 2 layer runs.

Shapes: D depths (layers + 1), B rows, T tokens, S variants at once, C hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from layerwise.measure.answers import Answered, depths
from layerwise.stack.base import Stack


@torch.inference_mode()
def mean_states(stack: Stack, tokens_BT: Tensor) -> Tensor:
    """The mean state of every depth over all tokens of some texts, [D, C] float32."""
    return torch.stack([state.hidden.float().mean((0, 1)) for state in depths(stack, stack.start(tokens_BT))])


@torch.inference_mode()
def erasure(stack: Stack, prompt: Answered, means_DC: Tensor, *, at: Sequence[int] | None = None,
            together: int = 16) -> Tensor:
    """E at the depths `at` (None: all), a row each, [D, T]; zero at tokens that nothing of the answer reads.

    `means_DC` are those of `mean_states`. `together` tokens are erased in one batch, each in a copy of its own.
    """
    states = depths(stack, prompt.start(stack, 1))
    clean_AV = prompt.probabilities(stack, states[-1])[0]
    read = int(prompt.places_A.max()) + 1
    wanted = range(len(states)) if at is None else at
    effect_DT = torch.zeros(len(wanted), len(prompt.tokens_T))
    shared = {count: prompt.start(stack, count) for count in {min(together, read), read % together or together}}
    for row, depth in enumerate(wanted):
        for place_S in torch.arange(read).split(together):
            h_STC = states[depth].hidden.repeat(len(place_S), 1, 1)
            h_STC[torch.arange(len(place_S)), place_S] = means_DC[depth].to(h_STC)
            changed = stack.run(shared[len(place_S)].moved(h_STC, depth))
            change_SAV = prompt.probabilities(stack, changed) - clean_AV
            effect_DT[row, place_S] = change_SAV.norm(dim=-1).amax(1).cpu()
    return effect_DT
