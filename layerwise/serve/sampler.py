"""Draws the next token of many requests at once, each by its own parameters and seed.

A token is drawn by inverting the cumulative distribution at a number that depends on the request's seed and the
token's position only. So a request's tokens do not depend on the other requests of a step, on how its prompt was cut,
or on guesses that were verified together: a guess is right exactly where it is the token that would be drawn anyway.

Shapes: P positions, V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as Many
from dataclasses import dataclass

import torch
from torch import Tensor

from layerwise.serve.placed import placed
from layerwise.serve.request import Params, TokenLogprob

MASK = (1 << 64) - 1
FEW = 512
"""Likeliest tokens among which a filter is looked for before all are sorted."""


@dataclass
class Position:
    """A place where a token is drawn: after `tokens`, of which the first `prompt` are the prompt."""

    params: Params
    seed: int
    tokens: Many[int]
    prompt: int


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) for a seed and a position (the finaliser of SplitMix64)."""
    z = (seed * 0x9E3779B97F4A7C15 + (position + 1) * 0xD1B54A32D192ED03) & MASK
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = ((z ^ (z >> shift)) * factor) & MASK
    return ((z ^ (z >> 31)) >> 11) * 2.0**-53


@torch.inference_mode()
def sample(logits_PV: Tensor, positions: Many[Position]) -> list[int]:
    """One token for each position, from its row of logits."""
    if all(position.params.plain for position in positions):
        return logits_PV.max(-1).indices.tolist()  # the first of equals like argmax, in a quarter of its time
    logits_PV = logits_PV.to(torch.float32, copy=True)
    for index, position in enumerate(positions):
        if not position.params.plain:
            adjust(logits_PV[index], position)
    tokens: list[int] = logits_PV.max(-1).indices.tolist()
    drawn = [index for index, position in enumerate(positions) if position.params.temperature > 0]
    if drawn:
        found = _draw(logits_PV[drawn], [positions[index] for index in drawn])
        for index, token in zip(drawn, found, strict=True):
            tokens[index] = token
    return tokens


def adjust(logits_V: Tensor, position: Position) -> None:
    """Penalties, biases and grammar, in place (the order of the OpenAI and Hugging Face definitions)."""
    params, device = position.params, logits_V.device
    if params.repetition_penalty != 1:
        seen = placed(sorted(set(position.tokens)), device)
        values = logits_V[seen]
        logits_V[seen] = torch.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
    if params.presence_penalty or params.frequency_penalty:
        counts = Counter(position.tokens[position.prompt :])
        if counts:
            times = placed(list(counts.values()), device)
            logits_V[placed(list(counts), device)] -= times * params.frequency_penalty + params.presence_penalty
    if params.logit_bias:
        bias = placed(list(params.logit_bias.values()), device, torch.float32)
        logits_V[placed(list(params.logit_bias), device)] += bias
    if params.grammar is not None:
        params.grammar.mask(logits_V)


def probabilities(logits_PV: Tensor, positions: Many[Position]) -> Tensor:
    """What tokens are drawn from, [P, V]: temperature, then top-k, top-p and min-p, each on what is left."""
    params = [position.params for position in positions]
    logits_PV = logits_PV / placed([p.temperature for p in params], logits_PV.device)[:, None]
    for index, p in enumerate(params):
        if 0 < p.top_k < logits_PV.shape[1]:
            logits_PV[index].masked_fill_(logits_PV[index] < logits_PV[index].topk(p.top_k).values[-1], float("-inf"))
    weights_PV = logits_PV.softmax(-1)
    for index, p in enumerate(params):
        if p.top_p < 1:
            _keep_top(weights_PV[index], p.top_p)
        if p.min_p > 0:
            weights_PV[index].masked_fill_(weights_PV[index] < p.min_p * weights_PV[index].max(), 0.0)
    return weights_PV / weights_PV.sum(-1, keepdim=True)


def _keep_top(weights_V: Tensor, mass: float) -> None:
    """Zero all but the fewest likeliest tokens that reach `mass`, in place; of equals, those that come first."""
    few = min(FEW, len(weights_V))
    top_F, index_F = weights_V.topk(few)
    if top_F.double().sum() < mass or top_F[-1] == top_F[0]:
        top_F, index_F = weights_V.sort(descending=True, stable=True)
    before_F = top_F.double().cumsum(-1) - top_F
    kept_F = index_F[before_F < mass]
    values = weights_V[kept_F]
    weights_V.zero_()
    weights_V[kept_F] = values


def _draw(logits_PV: Tensor, positions: Many[Position]) -> list[int]:
    sums_PV = probabilities(logits_PV, positions).double().cumsum(-1)
    numbers = [[uniform(position.seed, len(position.tokens))] for position in positions]
    u_P1 = placed(numbers, logits_PV.device, torch.float64)
    tokens_P = torch.searchsorted(sums_PV, u_P1 * sums_PV[:, -1:], right=True)[:, 0]
    return tokens_P.clamp(max=logits_PV.shape[1] - 1).tolist()


@torch.inference_mode()
def logprobs(logits_PV: Tensor, tokens: Many[int], counts: Many[int]) -> list[TokenLogprob]:
    """Log-probabilities of tokens, one a position, with those of the `counts` likeliest beside them."""
    logs_PV = logits_PV.float().log_softmax(-1)
    chosen = logs_PV.gather(1, placed(list(tokens), logs_PV.device, torch.int64)[:, None])[:, 0].tolist()
    most = max(counts, default=0)
    values_PM, index_PM = logs_PV.topk(most, -1) if most else (logs_PV[:, :0], logs_PV[:, :0])
    tops = [list(zip(map(int, index), value, strict=True))
            for index, value in zip(index_PM.tolist(), values_PM.tolist(), strict=True)]
    return [TokenLogprob(token, log, tuple(top[:count]))
            for token, log, top, count in zip(tokens, chosen, tops, counts, strict=True)]
