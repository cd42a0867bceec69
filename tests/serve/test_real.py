"""A real model, served as it is and packed, says what plain decoding says."""

from __future__ import annotations

import pytest
import torch

import layerwise as lw
from layerwise.serve.drafts import Lookup
from layerwise.serve.engine import Engine, layered
from layerwise.serve.request import Params
from layerwise.stack.decoder import DecoderStack
from tests.serve.plain import greedy

PROMPTS = ["The capital of France is", "one two three four one two three four one two", "def add(a, b):\n    return"]

pytestmark = pytest.mark.real


@pytest.fixture(scope="module", params=["smollm2", "gemma3-270m"])
def exact(request: pytest.FixtureRequest) -> DecoderStack:
    stack = lw.open(request.param, dtype="float32")
    assert isinstance(stack, DecoderStack)
    return stack


def test_greedy_text_is_that_of_plain_decoding(exact: DecoderStack) -> None:
    assert exact.tokenizer is not None
    engine = Engine(exact, cache_tokens=512, step_tokens=9, groups=layered(4), drafter=Lookup())
    for completion in engine.generate(PROMPTS, Params(max_tokens=10, stop_ids=())):
        assert list(completion.tokens) == greedy(exact, completion.prompt, 10)
        assert completion.text == exact.tokenizer.decode(completion.tokens, special=False)
    engine.check_integrity()


def test_greedy_tokens_are_those_of_transformers(exact: DecoderStack) -> None:
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(exact.folder, dtype=torch.float32)
    asked = [*PROMPTS, " ".join(f"{number} times {number + 1} is {number * (number + 1)}," for number in range(40))]
    engine = Engine(exact, cache_tokens=2048, step_tokens=100)
    for completion in engine.generate(asked, Params(max_tokens=12, stop_ids=())):
        ids = torch.tensor([completion.prompt])
        whole = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False,
                                eos_token_id=None, pad_token_id=0)
        assert list(completion.tokens) == whole[0, ids.shape[1] :].tolist()
