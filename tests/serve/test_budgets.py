"""Scores of tokens by hand and against loops."""

from __future__ import annotations

import torch

from layerwise.serve.budgets import POOL, attention, best, recent


def test_the_last_and_the_first_are_kept_by_age() -> None:
    k_SKD = torch.zeros(9, 1, 2)
    assert best(recent(k_SKD, k_SKD[:0]), 6, 1) == [0, 1, 2, 3, 7, 8]


def test_best_keeps_the_fresh_and_of_equals_the_earlier() -> None:
    assert best(torch.tensor([1.0, 5.0, 1.0, 5.0, 0.0]), 3, 1) == [1, 3, 4]
    assert best(torch.tensor([1.0, 1.0, 1.0, 1.0]), 2, 0) == [0, 1]


def test_attention_is_that_of_a_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    k_SKD, q_WHD = torch.randn(11, 2, 4, generator=generator), torch.randn(3, 4, 4, generator=generator)
    sums = [0.0] * 11
    for query in range(3):
        for head in range(4):
            seen_SD = k_SKD[: 9 + query, head // 2].double()
            weights_S = (seen_SD @ q_WHD[query, head].double() / 2).softmax(0)
            for key, weight in enumerate(weights_S.tolist()):
                sums[key] += weight
    reach = POOL // 2
    pooled = [sum(sums[max(0, key - reach) : key + reach + 1]) / POOL for key in range(11)]
    torch.testing.assert_close(attention(k_SKD, q_WHD), torch.tensor(pooled), rtol=1e-5, atol=1e-6)


def test_neighbours_of_a_needle_stay_with_it() -> None:
    k_SKD, q_WHD = torch.zeros(40, 1, 2), torch.zeros(1, 1, 2)
    k_SKD[20, 0, 0], q_WHD[0, 0, 0] = 9.0, 9.0
    assert best(attention(k_SKD, q_WHD), 6, 1) == [18, 19, 20, 21, 22, 39]
