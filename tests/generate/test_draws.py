"""Draws of many prompts at once against one prompt at a time, and against the model's own probabilities."""

from __future__ import annotations

import torch

from layerwise.generate.draws import draws
from layerwise.generate.sample import Sampling, generate
from layerwise.testing.stacks import random_stack

STACK = random_stack(2)
TOKENS = torch.randint(97, (3, 6), generator=torch.Generator().manual_seed(0))


def test_greedy_draws_are_all_what_generate_says() -> None:
    found = draws(STACK, TOKENS, 2, Sampling(), 5, 200, torch.Generator().manual_seed(0))
    assert found.shape == (3, 2, 5)
    for row in range(3):
        expected = list(generate(STACK, TOKENS[row].tolist(), max_tokens=5, stop=()))
        assert found[row].tolist() == [expected, expected]


def test_first_tokens_follow_the_probabilities_and_the_seed() -> None:
    sampling = Sampling(1.0, top_k=3)
    found = draws(STACK, TOKENS[:1], 4000, sampling, 1, 200, torch.Generator().manual_seed(0))
    share_V = torch.bincount(found.flatten(), minlength=97) / 4000
    torch.testing.assert_close(share_V, sampling.probabilities(STACK(TOKENS[:1])[0, -1]), atol=0.03, rtol=0)
    again = draws(STACK, TOKENS[:1], 4000, sampling, 1, 200, torch.Generator().manual_seed(0))
    assert torch.equal(found, again)


def test_it_ends_when_every_row_has_stopped() -> None:
    greedy = draws(STACK, TOKENS, 1, Sampling(), 5, 200, torch.Generator())
    stop = int(greedy[0, 0, 1])
    ended = draws(STACK, TOKENS[:1], 3, Sampling(), 5, stop, torch.Generator())
    assert ended.shape == (1, 3, 1 + greedy[0, 0].tolist().index(stop))
