"""Scores of given tokens are those of a whole pass where nothing is forgotten, and of what is left where it is."""

from __future__ import annotations

import pytest
import torch

from layerwise.errors import BadOption
from layerwise.generate.sample import next_logits
from layerwise.serve.engine import Engine
from layerwise.serve.forced import scores
from layerwise.serve.table import layer_table
from layerwise.stack.decoder import Caches, DecoderStack
from tests.serve.plain import prompts

ANSWERS = [[5, 6, 7], [96], [1, 1, 1, 1, 2]]


def test_scores_are_those_of_a_whole_pass(stack: DecoderStack) -> None:
    asked = prompts(3)
    engine = Engine(stack, cache_tokens=512, step_tokens=20)
    for prompt, answer, found in zip(asked, ANSWERS, scores(engine, asked, ANSWERS), strict=True):
        logs_TV = stack(torch.tensor([prompt + answer]))[0].log_softmax(-1)[len(prompt) - 1 : -1]
        assert [entry.token for entry in found] == answer
        expected = logs_TV[range(len(answer)), answer].tolist()
        assert [entry.logprob for entry in found] == pytest.approx(expected, abs=1e-4)
        assert [entry.top[0][0] for entry in found] == logs_TV.argmax(-1).tolist()
    engine.check_integrity()


def test_scores_tell_skipped_layers(stack: DecoderStack) -> None:
    [prompt], answer = prompts(1), ANSWERS[2]
    engine = Engine(stack, table=layer_table(stack.spec, skip=[1]), cache_tokens=512)
    [found] = scores(engine, [prompt], [answer])
    caches: Caches = {}
    logits_V = next_logits(stack, torch.tensor([prompt]), caches)[0]
    for entry, token in zip(found, answer, strict=True):
        assert entry.logprob == pytest.approx(float(logits_V.log_softmax(-1)[token]), abs=1e-4)
        logits_V = next_logits(stack, torch.tensor([[token]]), caches, (0, 2, 3))[0]


def test_scores_tell_what_budgets_forgot(stack: DecoderStack) -> None:
    prompt, answer = list(range(60)), [3, 4, 5, 6]
    budgets = dict.fromkeys(range(4), 8)
    engine = Engine(stack, table=layer_table(stack.spec, budgets=budgets), cache_tokens=512, block=64)
    [found], [whole] = scores(engine, [prompt], [answer]), scores(Engine(stack, cache_tokens=512), [prompt], [answer])
    assert found[0].logprob == pytest.approx(whole[0].logprob, abs=1e-4)
    assert all(abs(a.logprob - b.logprob) > 1e-4 for a, b in zip(found[1:], whole[1:], strict=True))


def test_an_empty_answer_is_refused(stack: DecoderStack) -> None:
    with pytest.raises(BadOption, match="max_tokens"):
        scores(Engine(stack, cache_tokens=64), [[1]], [[]])
