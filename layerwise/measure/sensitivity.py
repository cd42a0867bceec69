"""How much the predictions move with each channel of the residual stream: the diagonal of the Fisher information.

    F_c = mean over predictions of the sum over tokens of (d log p(y) / d h_c)^2,   y drawn from p

An error e_c in the states h that leave a layer changes the predictions by about F_c e_c^2 / 2 nats each (KL). Channels
differ by orders of magnitude: a few large ones, which the norms of later layers shrink, hold most of the stream's
energy and bear most errors. The gradients of all predictions of a batch are summed with random signs, so that one
backward serves them all, and what they have in common cancels on average. Source of the matrix: Martens, New insights
and perspectives on the natural gradient method, 2020 (arXiv 1412.1193); reading errors by it is our own.

Shapes: B rows, T tokens, P predictions, V vocabulary, C hidden width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from layerwise.measure.backward import below, head_gradient, places, trail
from layerwise.measure.inputs import Inputs
from layerwise.measure.progress import Progress
from layerwise.stack.decoder import DecoderStack

DRAWS = 2


def stream_sensitivity(stack: DecoderStack, data: Any, *, draws: int = DRAWS, seed: int = 0,
                       progress: bool = False) -> tuple[Tensor, ...]:
    """F after every layer, [C] float32 each. Cost: `draws` + 1 forward passes and `draws` backward ones.

    Raises BadOption where a layer's matrices are packed integers, BadModel where gradients are not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    items = list(Inputs(stack, data))
    sums = [torch.zeros(stack.spec.hidden, device=stack.device) for _ in range(len(stack))]
    count = draws * sum(places(item).numel() for item in items)
    with Progress("what predictions feel", len(items) * len(stack) * (1 + 2 * draws), progress) as bar:
        for batch, item in enumerate(items):
            states = trail(stack, item, bar)
            for _ in range(draws):
                arriving_BTC = head_gradient(stack, item, states[-1], lambda logits_PV, _: _drawn(logits_PV, generator))
                for layer in reversed(range(len(stack))):
                    sums[layer] += arriving_BTC.float().square().sum((0, 1))
                    if layer:
                        arriving_BTC = below(stack, layer, states[layer], arriving_BTC, batch)
                    bar.step(2)
    return tuple(sum_C / count for sum_C in sums)


def _drawn(logits_PV: Tensor, generator: torch.Generator) -> Tensor:
    """The sum, with random signs, of the log-probabilities of tokens drawn from these predictions."""
    log_p_PV = torch.log_softmax(logits_PV, -1)
    token_P1 = torch.multinomial(log_p_PV.detach().exp().cpu(), 1, generator=generator).to(log_p_PV.device)
    sign_P1 = torch.randint(0, 2, token_P1.shape, generator=generator).to(log_p_PV) * 2 - 1
    return (log_p_PV.gather(1, token_P1) * sign_P1).sum()
