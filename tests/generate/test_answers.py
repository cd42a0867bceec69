"""Batched answers with their states, against one prompt at a time and whole passes."""

from __future__ import annotations

import pytest
import torch

from layerwise.errors import BadData
from layerwise.generate.answers import answers
from layerwise.generate.sample import generate
from layerwise.stack.decoder import DecoderStack
from layerwise.testing.stacks import random_stack

PROMPTS = [[5, 6, 7, 1, 2], [5, 6, 7, 3], [5, 6, 7, 9, 9], [5, 6, 7, 8]]


@pytest.fixture(scope="module")
def stack() -> DecoderStack:
    return random_stack(3)


def test_answers_equal_generating_one_by_one(stack: DecoderStack) -> None:
    found = answers(stack, PROMPTS, 4, stop=-1)
    assert found.ids == tuple(tuple(generate(stack, prompt, max_tokens=4, stop=())) for prompt in PROMPTS)


def test_states_equal_a_whole_pass(stack: DecoderStack) -> None:
    found = answers(stack, PROMPTS, 4, stop=-1, batch=1)
    for row, prompt in enumerate(PROMPTS):
        with stack.capture("output") as seen:
            logits_1TV = stack(torch.tensor([prompt + list(found.ids[row])]))
        states_LTC = torch.stack([seen[layer, "output"][0] for layer in range(3)])
        last = len(prompt) - 1
        assert torch.allclose(found.prompt_NLC[row], states_LTC[:, last], atol=1e-5)
        assert torch.allclose(found.answer_NLC[row], states_LTC[:, last + 1 :].mean(1), atol=1e-5)
        chances = logits_1TV[0].log_softmax(-1).max(-1).values[last:-1]
        assert float(found.confidence_N[row]) == pytest.approx(float(chances.mean()), abs=1e-5)


def test_an_answer_ends_before_the_stop(stack: DecoderStack) -> None:
    free = answers(stack, PROMPTS, 4, stop=-1)
    stop = free.ids[1][2]
    found = answers(stack, PROMPTS, 4, stop=stop)
    assert found.ids == tuple(ids[: ids.index(stop)] if stop in ids else ids for ids in free.ids)


def test_an_empty_answer_has_the_states_of_its_prompt(stack: DecoderStack) -> None:
    stop = answers(stack, PROMPTS[:1], 1, stop=-1).ids[0][0]
    found = answers(stack, PROMPTS[:1], 4, stop=stop)
    assert found.ids == ((),)
    assert torch.equal(found.answer_NLC, found.prompt_NLC)


def test_no_prompt_is_refused(stack: DecoderStack) -> None:
    with pytest.raises(BadData, match="no prompts"):
        answers(stack, [], 3, stop=0)
    with pytest.raises(BadData, match="empty prompt"):
        answers(stack, [[1], []], 3, stop=0)
