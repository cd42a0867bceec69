"""The kept layers are the published ones, and one pass equals prefilling deep and decoding shallow."""

from __future__ import annotations

import pytest
import torch

import layerwise as lw
from layerwise.errors import BadOption
from layerwise.generate import skip
from layerwise.generate.sample import next_logits
from layerwise.stack.decoder import Caches, DecoderStack

PUBLISHED = {
    2: (0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 29),
    3: (0, 3, 6, 9, 12, 15, 18, 21, 24, 29),
    5: (0, 6, 12, 18, 24, 29),
    10: (0, 15, 29),
}
OTHERS = (skip.first, skip.last, skip.without_middle, skip.at_random)


@pytest.mark.parametrize(("speedup", "layers"), PUBLISHED.items())
def test_the_published_layers(speedup: int, layers: tuple[int, ...]) -> None:
    assert skip.unified(30, speedup) == layers


def test_no_speedup_keeps_every_layer() -> None:
    assert skip.unified(30, 1) == tuple(range(30))


@pytest.mark.parametrize("layers", [3, 12, 30, 31])
@pytest.mark.parametrize("speedup", [1, 1.5, 2, 3, 7])
def test_ends_are_kept_and_the_quota_is_met(layers: int, speedup: float) -> None:
    if int(layers / speedup) < 3:
        with pytest.raises(BadOption, match="three layers"):
            skip.unified(layers, speedup)
        return
    kept = skip.unified(layers, speedup)
    assert len(kept) == int(layers / speedup)
    assert kept == tuple(sorted(set(kept)))
    assert {0, layers - 1} <= set(kept)


@pytest.mark.parametrize("speedup", [0, 0.5, 11, 40])
def test_impossible_speedups_are_refused(speedup: float) -> None:
    with pytest.raises(BadOption):
        skip.unified(30, speedup)


@pytest.mark.parametrize("rule", OTHERS)
@pytest.mark.parametrize("speedup", [1, 2, 3])
def test_other_rules_keep_as_many(rule: type, speedup: float) -> None:
    kept = rule(30, speedup)
    assert len(kept) == len(skip.unified(30, speedup))
    assert list(kept) == sorted(set(kept)) and set(kept) <= set(range(30))


def test_what_other_rules_keep() -> None:
    assert skip.first(10, 2) == (0, 1, 2, 3, 4)
    assert skip.last(10, 2) == (5, 6, 7, 8, 9)
    assert skip.without_middle(10, 2) == (0, 1, 2, 8, 9)
    assert skip.at_random(30, 2, seed=1) == skip.at_random(30, 2, seed=1) != skip.at_random(30, 2, seed=2)


def test_running_all_layers_is_the_plain_pass(tiny_stack: DecoderStack) -> None:
    tokens_BT = torch.randint(97, (2, 7), generator=torch.Generator().manual_seed(0))
    state = skip.run_layers(tiny_stack, tiny_stack.start(tokens_BT), tuple(range(4)))
    assert torch.equal(tiny_stack.finish(state), tiny_stack(tokens_BT))


def test_layers_that_do_not_run_are_the_identity(tiny_stack: DecoderStack) -> None:
    tokens_BT = torch.randint(97, (2, 7), generator=torch.Generator().manual_seed(0))
    state = skip.run_layers(tiny_stack, tiny_stack.start(tokens_BT), (0, 3))
    with tiny_stack.skip(1), tiny_stack.skip(2):
        assert torch.equal(tiny_stack.finish(state), tiny_stack(tokens_BT))


@pytest.mark.parametrize("layers", [(0, 1, 2, 3), (0, 3), (0, 1), (2, 3), (1, 2), (3,)])
def test_one_pass_equals_prefilling_deep_and_decoding_shallow(
    tiny_stack: DecoderStack, layers: tuple[int, ...]
) -> None:
    tokens_BT = torch.randint(97, (3, 14), generator=torch.Generator().manual_seed(0))
    prompt = 6
    response_BT = (torch.arange(14) >= prompt).expand(3, 14)
    logits_BTV = skip.split_pass(tiny_stack, tokens_BT, response_BT, layers)
    caches: Caches = {}
    found = [next_logits(tiny_stack, tokens_BT[:, :prompt], caches)]
    for place in range(prompt, 14):
        found.append(next_logits(tiny_stack, tokens_BT[:, place : place + 1], caches, layers))
    torch.testing.assert_close(logits_BTV[:, prompt - 1 :], torch.stack(found, 1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits_BTV[:, :prompt], tiny_stack(tokens_BT)[:, :prompt], rtol=1e-5, atol=1e-5)


def test_rows_may_have_prompts_of_different_lengths(tiny_stack: DecoderStack) -> None:
    tokens_BT = torch.randint(97, (2, 10), generator=torch.Generator().manual_seed(0))
    response_BT = torch.arange(10) >= torch.tensor([[3], [7]])
    both_BTV = skip.split_pass(tiny_stack, tokens_BT, response_BT, (0, 3))
    for row in range(2):
        one_BTV = skip.split_pass(tiny_stack, tokens_BT[[row]], response_BT[[row]], (0, 3))
        torch.testing.assert_close(both_BTV[[row]], one_BTV, rtol=1e-5, atol=1e-5)


def test_several_tokens_may_be_decoded_at_once(tiny_stack: DecoderStack) -> None:
    tokens_BT = torch.randint(97, (1, 12), generator=torch.Generator().manual_seed(0))
    whole: Caches = {}
    next_logits(tiny_stack, tokens_BT[:, :5], whole)
    at_once_BV = next_logits(tiny_stack, tokens_BT[:, 5:], whole, (1, 3))
    response_BT = torch.arange(12)[None] >= 5
    logits_BTV = skip.split_pass(tiny_stack, tokens_BT, response_BT, (1, 3))
    torch.testing.assert_close(at_once_BV, logits_BTV[:, -1], rtol=1e-5, atol=1e-5)


def test_a_trained_split_pass_reaches_the_kept_layers(tiny_stack: DecoderStack) -> None:
    tokens_BT = torch.randint(97, (1, 8), generator=torch.Generator().manual_seed(0))
    tiny_stack.decoder.requires_grad_(True)
    response_BT = torch.arange(8)[None] >= 4
    skip.split_pass(tiny_stack, tokens_BT, response_BT, (0, 3))[:, 4:].sum().backward()
    moved = [
        any(p.grad is not None and bool(p.grad.any()) for p in tiny_stack.block(layer).parameters())
        for layer in range(4)
    ]
    assert moved == [True, True, True, True], "skipped layers learn from what the prompt passes on"


def test_a_layer_outside_the_table_is_refused(stack: lw.Stack) -> None:
    state = stack.start(torch.tensor([[1, 2]]))
    with pytest.raises(BadOption):
        skip.run_layers(stack, state, (0, 9))
