"""Tokens are drawn from the distribution asked for, each request by its own numbers."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from layerwise.serve.request import Params
from layerwise.serve.sampler import Position, adjust, logprobs, probabilities, sample, uniform

LOGITS_V = 2 * torch.randn(3000, generator=torch.Generator().manual_seed(0))


def position(seed: int = 0, tokens: tuple[int, ...] = (1, 2), **params: Any) -> Position:
    return Position(Params(**params), seed, tokens, 1)


@pytest.mark.parametrize("params", [
    {}, {"top_k": 5}, {"top_p": 0.7}, {"top_p": 0.99}, {"min_p": 0.1}, {"top_k": 40, "top_p": 0.8, "min_p": 0.05}])
def test_filters_are_those_of_transformers(params: dict[str, Any]) -> None:
    wrap = LogitsProcessorList([TemperatureLogitsWarper(0.7)])
    if "top_k" in params:
        wrap.append(TopKLogitsWarper(params["top_k"]))
    if "top_p" in params:
        wrap.append(TopPLogitsWarper(params["top_p"]))
    if "min_p" in params:
        wrap.append(MinPLogitsWarper(params["min_p"]))
    expected = wrap(torch.tensor([[0]]), LOGITS_V[None]).softmax(-1)
    found = probabilities(LOGITS_V[None].clone(), [position(temperature=0.7, **params)])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)


def test_penalties_and_biases_are_their_formulas() -> None:
    logits_V = LOGITS_V.clone()
    adjust(logits_V, position(tokens=(4, 7, 7, 9), repetition_penalty=1.5))
    expected = RepetitionPenaltyLogitsProcessor(1.5)(torch.tensor([[4, 7, 7, 9]]), LOGITS_V[None].clone())[0]
    torch.testing.assert_close(logits_V, expected)
    logits_V = LOGITS_V.clone()
    adjust(logits_V, position(tokens=(4, 7, 7, 9), presence_penalty=0.5, frequency_penalty=0.25, logit_bias={9: 3.0}))
    change = logits_V - LOGITS_V
    assert change[7] == pytest.approx(-0.5 - 2 * 0.25, abs=1e-5)  # the prompt's token 4 is not counted
    assert change[9] == pytest.approx(3.0 - 0.5 - 0.25, abs=1e-5) and int((change != 0).sum()) == 2


def test_draws_follow_the_probabilities() -> None:
    weights_V = torch.tensor([0.5, 0.05, 0.3, 0.15])
    rows = [position(seed, temperature=1.0) for seed in range(6000)]
    drawn = Counter(sample(weights_V.log().expand(6000, -1), rows))
    shares_V = torch.tensor([drawn[token] / 6000 for token in range(4)])
    torch.testing.assert_close(shares_V, weights_V, rtol=0, atol=0.02)


def test_numbers_of_a_seed_are_spread_evenly_and_unlike_those_of_others() -> None:
    rows = torch.tensor([[uniform(seed, place) for place in range(200)] for seed in range(200)], dtype=torch.float64)
    assert rows.min() >= 0 and rows.max() < 1
    assert torch.histc(rows.flatten(), 10, 0, 1).sub(4000).abs().max() < 250
    for pairs in (torch.stack([rows[:, :-1].flatten(), rows[:, 1:].flatten()]),
                  torch.stack([rows[:-1].flatten(), rows[1:].flatten()])):
        assert abs(torch.corrcoef(pairs)[0, 1]) < 0.02


def test_batch_mates_do_not_matter() -> None:
    rows = [position(seed, (1,) * (1 + seed % 5), **params) for seed, params in enumerate(
        [{}, {"temperature": 1.0}, {"temperature": 0.5, "top_p": 0.9}, {"repetition_penalty": 1.2}] * 5)]
    logits_PV = torch.randn(20, 500, generator=torch.Generator().manual_seed(1))
    together = sample(logits_PV, rows)
    assert together == [sample(logits_PV[index, None], [row])[0] for index, row in enumerate(rows)]


def test_nothing_is_done_to_the_logits() -> None:
    logits_PV = LOGITS_V[None].clone()
    sample(logits_PV, [position(temperature=1.0, top_k=3, frequency_penalty=1.0)])
    assert torch.equal(logits_PV[0], LOGITS_V)


def test_a_filtered_token_is_never_drawn() -> None:
    logits_PV = torch.zeros(500, 6)
    rows = [position(seed, temperature=1.0, top_p=0.5, logit_bias={5: float("-inf"), 0: float("-inf")})
            for seed in range(500)]
    assert set(sample(logits_PV, rows)) <= {1, 2, 3, 4}


def test_logprobs_are_of_the_unchanged_logits() -> None:
    first, second = logprobs(torch.stack([LOGITS_V, -LOGITS_V]), [5, 6], [2, 0])
    logs_V = LOGITS_V.log_softmax(-1)
    assert first.logprob == pytest.approx(float(logs_V[5]), abs=1e-5) and second.top == ()
    assert [token for token, _ in first.top] == logs_V.topk(2).indices.tolist()
