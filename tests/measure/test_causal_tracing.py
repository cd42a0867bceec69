"""Tracing in one batch equals a plain loop over tokens, layers and draws."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch

from layerwise.data.prompts import Located
from layerwise.measure.causal_tracing import Corruption, causal_trace, embedding_deviation, noised_state
from layerwise.stack.changes import at, put
from layerwise.stack.decoder import DecoderStack

PROMPT = Located((3, 20, 21, 4, 5), 1, 2)
CORRUPTION = Corruption(draws=3, window=3)
CLOSE = {"atol": 1e-5, "rtol": 1e-4}  # float32 sums in another order


def chance(stack: DecoderStack, state, answer: int = 7) -> float:  # type: ignore[no-untyped-def]
    return float(stack.finish(stack.run(state))[0, -1].softmax(-1)[answer])


def test_a_trace_equals_a_loop(tiny_stack: DecoderStack) -> None:
    trace = causal_trace(tiny_stack, PROMPT, 7, 0.5, CORRUPTION)
    tokens_1T = torch.tensor([PROMPT.tokens])
    with tiny_stack.capture("feed_forward") as seen:
        assert trace.clean == pytest.approx(chance(tiny_stack, tiny_stack.start(tokens_1T)), rel=1e-4)
    clean = dict(seen)
    hidden_DTC = noised_state(tiny_stack, PROMPT, 0.5, CORRUPTION).hidden
    start = tiny_stack.start(tokens_1T)
    draws = [start.moved(hidden_1TC, 0) for hidden_1TC in hidden_DTC.split(1)]
    assert trace.noised == pytest.approx(sum(chance(tiny_stack, draw) for draw in draws) / 3, rel=1e-4)
    assert trace.tokens == (1, 2, 3, 4) and trace.layers == (0, 1, 2, 3)
    for row, token in enumerate(trace.tokens):
        for layer in trace.layers:
            found = []
            for draw in draws:
                with ExitStack() as context:
                    for near in range(max(0, layer - 1), min(4, layer + 2)):
                        change = at(torch.arange(5) == token, put(clean[near, "feed_forward"]))
                        context.enter_context(tiny_stack.edit(near, "feed_forward", change))
                    found.append(chance(tiny_stack, draw))
            torch.testing.assert_close(trace.restored_RL[row, layer], torch.tensor(found).mean(), **CLOSE)


def test_restoring_what_leaves_the_last_layer_brings_all_back(tiny_stack: DecoderStack) -> None:
    trace = causal_trace(tiny_stack, PROMPT, 7, 0.5, Corruption(draws=3, window=1, site="output"), layers=[3])
    torch.testing.assert_close(trace.restored_RL[-1, 0], torch.tensor(trace.clean), **CLOSE)
    torch.testing.assert_close(trace.restored_RL[0, 0], torch.tensor(trace.noised), **CLOSE)


def test_noise_falls_on_the_subject_alone_and_is_repeatable(tiny_stack: DecoderStack) -> None:
    one, two = (noised_state(tiny_stack, PROMPT, 0.5, CORRUPTION).hidden for _ in range(2))
    clean = tiny_stack.start(torch.tensor([PROMPT.tokens])).hidden
    assert torch.equal(one, two)
    assert torch.equal(one[:, [0, 3, 4]], clean[:, [0, 3, 4]].expand(3, -1, -1))
    large = noised_state(tiny_stack, PROMPT, 0.5, Corruption(draws=2000)).hidden - clean
    assert float(large[:, 1:3].std()) == pytest.approx(1.5, rel=0.02)


def test_the_deviation_is_that_of_the_embeddings(tiny_stack: DecoderStack) -> None:
    tokens_1T = torch.arange(50)[None]
    expected = tiny_stack.decoder.embedding(tokens_1T).std()
    assert embedding_deviation(tiny_stack, tokens_1T) == pytest.approx(float(expected), rel=1e-4)


def test_shares_are_between_nothing_and_all_that_was_lost(tiny_stack: DecoderStack) -> None:
    trace = causal_trace(tiny_stack, PROMPT, 7, 0.5, CORRUPTION)
    assert bool((trace.share_RL >= 0).all())
    assert torch.equal(trace.by_layer_L, trace.share_RL.max(0).values)
