"""Contrast with an early layer, against a loop and by hand."""

from __future__ import annotations

import math

import pytest
import torch

from layerwise.generate.dola import contrast, divergence


def test_divergence_by_hand() -> None:
    a, b = torch.tensor([1.0, 0.0]).clamp(min=1e-12).log(), torch.tensor([0.0, 1.0]).clamp(min=1e-12).log()
    assert float(divergence(a, b)) == pytest.approx(math.log(2), abs=1e-6)
    assert float(divergence(a, a)) == pytest.approx(0, abs=1e-6)


def test_contrast_equals_a_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    final = (3 * torch.randn(4, 11, generator=generator)).double().log_softmax(-1)
    early = (3 * torch.randn(3, 4, 11, generator=generator)).double().log_softmax(-1)
    scores, chosen = contrast(final, early)
    for row in range(4):
        q = final[row].exp().tolist()
        far = []
        for layer in range(3):
            p = early[layer, row].exp().tolist()
            m = [(x + y) / 2 for x, y in zip(q, p, strict=True)]
            far.append(sum(x * math.log(x / z) + y * math.log(y / z) for x, y, z in zip(q, p, m, strict=True)) / 2)
        assert int(chosen[row]) == far.index(max(far))
        for token in range(11):
            plausible = q[token] >= 0.1 * max(q)
            expected = float(final[row, token] - early[chosen[row], row, token]) if plausible else -math.inf
            assert float(scores[row, token]) == pytest.approx(expected)


def test_the_likeliest_token_always_stays() -> None:
    final = torch.tensor([[0.9, 0.05, 0.05]]).log()
    scores, _ = contrast(final, torch.tensor([[[0.98, 0.01, 0.01]]]).log())
    assert scores.argmax(-1).tolist() == [0]
    assert scores[0, 1:].tolist() == [-math.inf, -math.inf]
