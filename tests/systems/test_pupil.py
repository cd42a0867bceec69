"""The small model learns what its sentences say, the same way every time, and leaves the global generator alone."""

from __future__ import annotations

import torch

from layerwise.systems.pupil import pupil

SENTENCES = ["the cat sees the dog .", "the dog hears a bird ."]


def test_it_learns_its_sentences() -> None:
    stack = pupil(SENTENCES, layers=2, width=32, steps=60)
    assert stack.tokenizer is not None
    for before, after in [("the cat sees the", "dog"), ("the dog hears a", "bird")]:
        logits_BTV = stack(torch.tensor([stack.tokenizer.encode(before)]))
        assert stack.tokenizer.decode([int(logits_BTV[0, -1].argmax())]) == after
    assert not any(parameter.requires_grad for parameter in stack.decoder.parameters())


def test_the_seed_is_the_model() -> None:
    state = torch.get_rng_state()
    one, same, other = (dict(pupil(SENTENCES, layers=1, width=16, steps=2, seed=seed).tensors()) for seed in (0, 0, 1))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["embedding.weight"], other["embedding.weight"])
    assert torch.equal(torch.get_rng_state(), state)
