"""Edits on a small random model: they do what they say, batched or not, and leave the given model as it was."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch

from layerwise.data.prompts import Located
from layerwise.errors import BadOption
from layerwise.spec import Attention, FeedForward, LayerSpec
from layerwise.stack import DecoderStack
from layerwise.testing.stacks import random_stack
from layerwise.transform.model_editing import edited, memit, neuron_moments, rome, written
from layerwise.transform.wishes import Request, Search, keys, last_matrix, wishes

LAYERS = (1, 2)
CLOSE = {"atol": 1e-4, "rtol": 1e-4}  # twenty float32 steps in another order of sums


def request(subject: int, answer: int) -> Request:
    bare = Located((3, subject, subject + 1, 4), 1, 2)
    longer = Located((7, 8, 3, subject, subject + 1, 4), 3, 4)
    return Request((bare, longer), Located((subject, subject + 1, 5, 6), 0, 1), answer)


def ending(subject: int, answer: int) -> Request:
    """A request whose prompts end with the subject, where even a random model can be told anything."""
    asked = request(subject, answer)
    prompts = tuple(Located(prompt.tokens[:-1], prompt.first, prompt.last) for prompt in asked.prompts)
    return Request(prompts, asked.essence, answer)


REQUESTS = [request(20, 50), request(30, 60), request(40, 70)]
ENDING = [ending(20, 50), ending(30, 60), ending(40, 70)]


@pytest.fixture
def stack() -> DecoderStack:
    return random_stack(4, hidden=32)


@pytest.fixture
def moments(stack: DecoderStack) -> dict[int, torch.Tensor]:
    tokens_BT = torch.randint(97, (8, 40), generator=torch.Generator().manual_seed(1))
    return neuron_moments(stack, [stack.start(part) for part in tokens_BT.split(4)], LAYERS)


def chance(stack: DecoderStack, asked: Request) -> float:
    return float(stack(torch.tensor([asked.prompts[0].tokens]))[0, -1].softmax(-1)[asked.answer])


def test_moments_are_those_of_a_loop(stack: DecoderStack, moments: dict[int, torch.Tensor]) -> None:
    tokens_BT = torch.randint(97, (8, 40), generator=torch.Generator().manual_seed(1))
    with stack.capture("neurons") as seen:
        stack(tokens_BT)
    for layer in LAYERS:
        x = seen[layer, "neurons"].flatten(0, 1).double()
        expected = sum(torch.outer(row, row) for row in x) / len(x)
        expected += 1e-4 * expected.diagonal().mean() * torch.eye(64)  # type: ignore[union-attr]
        torch.testing.assert_close(moments[layer].double(), expected, atol=1e-5, rtol=1e-5)


def test_one_edit_makes_the_layer_write_what_was_wanted(stack: DecoderStack, moments: dict[int, torch.Tensor]) -> None:
    shift_NC, start_NC = wishes(stack, 1, REQUESTS, Search())
    for asked, weight, shift_C, start_C in zip(REQUESTS, rome(stack, 1, REQUESTS, moments[1]), shift_NC, start_NC,
                                               strict=True):
        with written(stack, {1: weight}), stack.capture("feed_forward") as seen:
            stack(torch.tensor([asked.prompts[0].tokens]))
        torch.testing.assert_close(seen[1, "feed_forward"][0, asked.prompts[0].last], start_C + shift_C, **CLOSE)


def test_one_edit_raises_the_answer_and_is_undone(stack: DecoderStack, moments: dict[int, torch.Tensor]) -> None:
    before = [chance(stack, asked) for asked in ENDING]
    tensors = {name: tensor.clone() for name, tensor in stack.tensors()}
    for asked, weight, old in zip(ENDING, rome(stack, 1, ENDING, moments[1]), before, strict=True):
        with written(stack, {1: weight}):
            told = chance(stack, asked)
        assert told > 5 * old
        assert chance(edited(stack, {1: weight}), asked) == told
    assert [chance(stack, asked) for asked in ENDING] == before
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in stack.tensors())


def test_requests_do_not_see_each_other(stack: DecoderStack) -> None:
    together, _ = wishes(stack, 1, REQUESTS, Search(steps=5))
    alone = torch.cat([wishes(stack, 1, [asked], Search(steps=5))[0] for asked in REQUESTS])
    torch.testing.assert_close(together, alone, **CLOSE)


def test_a_wish_equals_a_plain_loop(stack: DecoderStack) -> None:
    asked, search = REQUESTS[0], Search(steps=4)
    shift_C = torch.zeros(32, requires_grad=True)
    optimizer = torch.optim.Adam([shift_C], lr=search.rate)
    prompts = [*asked.prompts, asked.essence]

    def runs(shift: torch.Tensor) -> Sequence[torch.Tensor]:
        found = []
        for prompt in prompts:
            def add(x_BTC: torch.Tensor, place: int = prompt.last) -> torch.Tensor:
                changed = x_BTC.clone()
                changed[:, place] += shift
                return changed
            with stack.edit(1, "feed_forward", add):
                found.append(stack(torch.tensor([prompt.tokens]))[0].log_softmax(-1))
        return found

    with torch.no_grad(), stack.capture("feed_forward") as seen:
        before = runs(torch.zeros(32))[-1][asked.essence.last]
        stack(torch.tensor([asked.prompts[0].tokens]))
    size = seen[1, "feed_forward"][0, asked.prompts[0].last].norm()
    for _ in range(search.steps):
        *told, about = runs(shift_C)
        after = about[asked.essence.last]
        loss = sum(-log_p[-1, asked.answer] for log_p in told) / len(told)
        loss = loss + search.kl * (after.exp() * (after - before)).sum() + search.decay * shift_C.norm() / size**2
        optimizer.zero_grad()
        loss.backward()  # type: ignore[union-attr]
        optimizer.step()
        with torch.no_grad():
            shift_C *= min(1.0, float(search.largest * size / shift_C.norm()))
    torch.testing.assert_close(wishes(stack, 1, [asked], search)[0][0], shift_C.detach(), **CLOSE)


def test_a_wish_stays_within_its_bound(stack: DecoderStack) -> None:
    shift_NC, start_NC = wishes(stack, 1, REQUESTS, Search(largest=0.1))
    assert bool((shift_NC.norm(dim=1) <= 0.1001 * start_NC.norm(dim=1)).all())


def test_keys_are_the_neurons_at_the_subject(stack: DecoderStack) -> None:
    mean_NI, bare_NI = keys(stack, 2, REQUESTS)
    with stack.capture("neurons") as seen:
        stack(torch.tensor([REQUESTS[1].prompts[0].tokens]))
    torch.testing.assert_close(bare_NI[1], seen[2, "neurons"][0, 2], **CLOSE)
    assert not torch.allclose(mean_NI, bare_NI)


def test_a_batch_edit_answers_all_and_spares_the_given_model(stack: DecoderStack,
                                                             moments: dict[int, torch.Tensor]) -> None:
    before = copy.deepcopy(dict(stack.tensors()))
    changed = memit(stack, LAYERS, ENDING, moments, weight=0.01, search=Search(largest=4.0))
    for asked in ENDING:
        assert chance(changed, asked) > max(0.3, 10 * chance(stack, asked))
    assert all(torch.equal(tensor, before[name]) for name, tensor in stack.tensors())
    assert changed.decoder.embedding is stack.decoder.embedding


def test_networks_that_do_not_write_straight_are_refused() -> None:
    row = LayerSpec(Attention(4, 2, 8), FeedForward(64), post_norm=True)
    with pytest.raises(BadOption, match="straight into"):
        last_matrix(random_stack(2, hidden=32, row=row), 0)
