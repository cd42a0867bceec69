"""Integrated gradients of an answer's probability over the states at every depth: which token matters where.

    A[d, t] = sum_c (h - b)_tc * mean_k dF/dx_tc at x = b + a_k (h - b)

h are the states of one text at depth d, b their mean over the text, F the summed probability of the answer's
tokens as a function of all states at that depth. The values of one depth add up to F(h) - F(b). Source: arXiv
2505.13898, after Sundararajan et al. 2017 (arXiv 1703.01365). Published are a_k = k / 256; here the middles of
`steps` equal parts, whose error falls with the square of their number. Cost: steps x layers^2 / 2 layer runs
forward and backward.

Shapes: D depths (layers + 1), T tokens, S steps at once, C hidden width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from layerwise.measure.answers import Answered, depths
from layerwise.stack.base import Stack, State


@dataclass(frozen=True)
class Attribution:
    """`tokens_DT` is A, float64; `gain_D` is F(h) - F(b), which each row of A adds up to."""

    tokens_DT: Tensor
    gain_D: Tensor

    @property
    def missing_D(self) -> Tensor:
        """How far each row is from adding up: the error of the integral."""
        return (self.tokens_DT.sum(1) - self.gain_D).abs()


def integrated_gradients(stack: Stack, prompt: Answered, *, steps: int = 32, at: Sequence[int] | None = None,
                         together: int = 8) -> Attribution:
    """Attribution of one answer to the states at the depths `at` (None: all), a row each.

    `together` steps run in one batch. Use float32: rounding swamps small gradients.
    """
    with torch.no_grad():
        states = depths(stack, prompt.start(stack, 1))
    shared = {count: prompt.start(stack, count) for count in {1, together, steps % together or together}}
    rows, gains = [], []
    for state in states if at is None else [states[depth] for depth in at]:
        h_TC = state.hidden[0].detach()
        b_TC = h_TC.mean(0, keepdim=True).expand_as(h_TC)
        with torch.no_grad():
            whole = _chance(stack, prompt, shared[1], h_TC[None], state.layer)
            gains.append((whole - _chance(stack, prompt, shared[1], b_TC[None], state.layer)).double())
        slope_TC = torch.zeros_like(h_TC, dtype=torch.float64)
        middles_K = (torch.arange(steps) + 0.5) / steps
        for a_S in middles_K.split(together):
            x_STC = b_TC + a_S.to(h_TC)[:, None, None] * (h_TC - b_TC)
            with torch.enable_grad():
                x_STC = x_STC.detach().requires_grad_()
                total = _chance(stack, prompt, shared[len(a_S)], x_STC, state.layer).sum()
                slope_TC += torch.autograd.grad(total, x_STC)[0].double().sum(0)
        rows.append((slope_TC / steps * (h_TC - b_TC).double()).sum(-1))
    return Attribution(torch.stack(rows).cpu(), torch.cat(gains).cpu())


def _chance(stack: Stack, prompt: Answered, shared: State, x_STC: Tensor, layer: int) -> Tensor:
    return prompt.chance(stack, stack.run(shared.moved(x_STC, layer)))
