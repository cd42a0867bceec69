"""Integrated gradients and erasure: what one answer reads from each token at each depth."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from layerwise.errors import BadData
from layerwise.measure.answers import Answered, prompts
from layerwise.measure.erasure import erasure, mean_states
from layerwise.measure.integrated_gradients import integrated_gradients
from layerwise.stack.decoder import DecoderStack
from layerwise.testing.stacks import random_stack


@pytest.fixture
def stack() -> DecoderStack:
    return random_stack(3, hidden=32)


@pytest.fixture
def prompt() -> Answered:
    return Answered(torch.randint(97, (8,), generator=torch.Generator().manual_seed(3)), (5, 6))


def chance(stack: DecoderStack, prompt: Answered, hidden_TC: Tensor, layer: int) -> Tensor:
    """The summed probability of the answer from states at one depth."""
    logits_TV = stack.finish(stack.run(stack.start(prompt.tokens_T[None]).moved(hidden_TC[None], layer)))[0]
    return sum(logits_TV[place - 1].softmax(-1)[prompt.tokens_T[place]] for place in prompt.answers)


def entering(stack: DecoderStack, prompt: Answered, layer: int) -> Tensor:
    state = stack.start(prompt.tokens_T[None])
    return stack.run(state, slice(0, layer)).hidden[0]


@pytest.mark.parametrize("depth", [0, 2, 3])
def test_attribution_equals_a_loop_over_steps(stack: DecoderStack, prompt: Answered, depth: int) -> None:
    found = integrated_gradients(stack, prompt, steps=5, together=2)
    h_TC = entering(stack, prompt, depth)
    b_TC, slope = h_TC.mean(0).expand_as(h_TC), torch.zeros_like(h_TC)
    for k in range(5):
        x_TC = (b_TC + (k + 0.5) / 5 * (h_TC - b_TC)).requires_grad_()
        slope += torch.autograd.grad(chance(stack, prompt, x_TC, depth), x_TC)[0] / 5
    assert found.tokens_DT[depth].tolist() == pytest.approx((slope * (h_TC - b_TC)).sum(-1).tolist(), abs=1e-6)
    gain = float(chance(stack, prompt, h_TC, depth) - chance(stack, prompt, b_TC, depth))
    assert float(found.gain_D[depth]) == pytest.approx(gain, abs=1e-6)


def test_attributions_add_up_as_steps_grow(stack: DecoderStack, prompt: Answered) -> None:
    few, many = (integrated_gradients(stack, prompt, steps=steps).missing_D for steps in (4, 128))
    assert float(many.max()) < 1e-4
    assert float(many.max()) < float(few.max())


def test_only_chosen_depths_are_attributed(stack: DecoderStack, prompt: Answered) -> None:
    every, some = (integrated_gradients(stack, prompt, steps=4, at=at) for at in (None, [0, 3]))
    assert torch.equal(some.tokens_DT, every.tokens_DT[[0, 3]])


def test_tokens_after_the_answer_are_given_nothing(stack: DecoderStack, prompt: Answered) -> None:
    found = integrated_gradients(stack, prompt, steps=3)
    assert found.tokens_DT[:, 6:].abs().max() == 0
    last = found.tokens_DT[3]
    assert last[:4].abs().max() == 0
    assert last[4:6].abs().min() > 0


@pytest.mark.parametrize("together", [1, 4, 16])
def test_erasure_equals_one_run_for_each_token(stack: DecoderStack, prompt: Answered, together: int) -> None:
    texts = torch.randint(97, (3, 8), generator=torch.Generator().manual_seed(4))
    means_DC = mean_states(stack, texts)
    assert torch.allclose(means_DC[1], stack.run(stack.start(texts), slice(0, 1)).hidden.mean((0, 1)), atol=1e-6)
    found = erasure(stack, prompt, means_DC, together=together)
    clean = stack(prompt.tokens_T[None])[0].softmax(-1)
    for depth in range(4):
        for place in range(6):
            h_TC = entering(stack, prompt, depth).clone()
            h_TC[place] = means_DC[depth]
            state = stack.start(prompt.tokens_T[None]).moved(h_TC[None], depth)
            changed = stack.finish(stack.run(state))[0].softmax(-1)
            expected = max(float((clean - changed)[at - 1].norm()) for at in prompt.answers)
            assert float(found[depth, place]) == pytest.approx(expected, abs=1e-6)
    assert found[:, 6:].abs().max() == 0
    assert torch.equal(erasure(stack, prompt, means_DC, at=[1, 2], together=together), found[1:3])


@pytest.mark.parametrize("places", [(), (0,), (8,)])
def test_an_answer_has_a_place_after_the_first_token(places: tuple[int, ...]) -> None:
    with pytest.raises(BadData, match="answer at places"):
        Answered(torch.zeros(8, dtype=torch.int64), places)


def test_rows_with_their_last_tokens_as_answers() -> None:
    asked = prompts(torch.arange(12).view(2, 6), 2)
    assert [item.answers for item in asked] == [(4, 5), (4, 5)]
    assert asked[0].first == 3
