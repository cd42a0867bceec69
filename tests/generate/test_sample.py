"""Decoding with caches gives the tokens that the reference gives, and ends when it should."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import layerwise as lw
from layerwise.errors import BadData, BadOption
from layerwise.generate.sample import Sampling, generate, next_logits
from layerwise.stack import ModuleStack

PROMPT = [5, 17, 3, 88, 41]


@pytest.mark.parametrize("prompt", [PROMPT, [9]])
def test_greedy_tokens_are_those_of_transformers(
    stack: lw.Stack, reference: tuple[Any, Path], prompt: list[int]
) -> None:
    tokens_BT = torch.tensor([prompt])
    whole_BT = reference[0].generate(
        tokens_BT,
        attention_mask=torch.ones_like(tokens_BT),
        max_new_tokens=32,
        do_sample=False,
        eos_token_id=None,
    )
    assert list(generate(stack, prompt, max_tokens=32)) == whole_BT[0, len(prompt) :].tolist()


def test_next_logits_are_the_last_of_the_whole_pass(stack: lw.Stack) -> None:
    tokens_BT = torch.tensor([PROMPT, PROMPT[::-1]])
    found_BV = next_logits(stack, tokens_BT, {})
    torch.testing.assert_close(found_BV, stack(tokens_BT)[:, -1], rtol=0, atol=1e-5)


def test_sampling_is_repeatable_and_follows_the_seed(stack: lw.Stack) -> None:
    def draw(seed: int) -> list[int]:
        return list(generate(stack, PROMPT, max_tokens=20, temperature=1.0, seed=seed))

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_the_seed_does_not_touch_the_global_generator(stack: lw.Stack) -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    list(generate(stack, PROMPT, max_tokens=4, temperature=1.0))
    assert torch.equal(torch.rand(2), expected)


def test_it_ends_before_a_stop_token(stack: lw.Stack) -> None:
    whole = list(generate(stack, PROMPT, max_tokens=16))
    stop = whole[4]
    assert list(generate(stack, PROMPT, max_tokens=16, stop=[stop])) == whole[: whole.index(stop)]


def test_it_ends_when_the_context_is_full(stack: lw.Stack) -> None:
    assert len(list(generate(stack, [1] * 60, max_tokens=100))) == 64 - 60 + 1


def test_gradients_are_as_they_were_between_tokens(stack: lw.Stack) -> None:
    stream = generate(stack, PROMPT, max_tokens=3)
    next(stream)
    assert not torch.is_inference_mode_enabled()


def test_filters_match_those_of_transformers() -> None:
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits_V = torch.randn(200, generator=torch.Generator().manual_seed(0))
    scores_BV = TemperatureLogitsWarper(0.7)(None, logits_V[None])
    scores_BV = TopPLogitsWarper(0.8)(None, TopKLogitsWarper(50)(None, scores_BV))
    found_V = Sampling(0.7, top_k=50, top_p=0.8).probabilities(logits_V)
    torch.testing.assert_close(found_V, scores_BV[0].softmax(-1))


def test_a_narrow_filter_is_greedy() -> None:
    logits_V = torch.randn(50, generator=torch.Generator().manual_seed(1))
    best = int(logits_V.argmax())
    generator = torch.Generator().manual_seed(0)
    assert Sampling(1.0, top_k=1).draw(logits_V, generator) == best
    assert Sampling(1.0, top_p=1e-6).draw(logits_V, generator) == best


def test_draws_follow_the_probabilities() -> None:
    weights_V = torch.tensor([0.6, 0.3, 0.1])
    generator = torch.Generator().manual_seed(0)
    drawn = [Sampling(1.0).draw(weights_V.log(), generator) for _ in range(4000)]
    shares_V = torch.bincount(torch.tensor(drawn), minlength=3) / len(drawn)
    torch.testing.assert_close(shares_V, weights_V, rtol=0, atol=0.03)


@pytest.mark.parametrize(
    "option",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"temperature": 1.0, "top_k": 0},
        {"temperature": 1.0, "top_p": 0.0},
        {"temperature": 1.0, "top_p": 1.5},
        {"max_tokens": 0},
    ],
)
def test_impossible_options_are_refused_before_anything_runs(stack: lw.Stack, option: dict[str, Any]) -> None:
    with pytest.raises(BadOption):
        generate(stack, PROMPT, **option)


@pytest.mark.parametrize("prompt", [[], "text without a tokenizer", [1] * 65])
def test_impossible_prompts_are_refused(stack: lw.Stack, prompt: Any) -> None:
    with pytest.raises(BadData):
        generate(stack, prompt)


def test_a_module_is_refused_with_the_way_out() -> None:
    module = torch.nn.Sequential(*[torch.nn.Linear(4, 4) for _ in range(3)])
    with pytest.raises(BadOption, match="decoder"):
        generate(ModuleStack(module), [1])
