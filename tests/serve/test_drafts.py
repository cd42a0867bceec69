"""Guessing ahead changes how fast tokens come, and nothing else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch

from layerwise.errors import BadOption
from layerwise.serve.drafts import Drafter, Lookup, accepted
from layerwise.serve.engine import Engine
from layerwise.serve.model_drafts import SecondModel, SomeLayers
from layerwise.serve.relaxed import InGroups
from layerwise.serve.request import Params, Request
from layerwise.serve.sequence import Row, Sequence
from layerwise.serve.table import layer_table
from layerwise.stack.decoder import DecoderStack
from layerwise.testing.stacks import random_stack
from tests.serve.plain import KINDS, drawn, prompts, serve

DRAFTERS: dict[str, Callable[[], Drafter]] = {
    "lookup": lambda: Lookup(shortest=1),
    "some layers": lambda: SomeLayers([0, 3], most=3),
    "all layers": lambda: SomeLayers(None, most=2),
    "a second model": lambda: SecondModel(random_stack(2, seed=5), most=3),
    "the same model": lambda: SecondModel(random_stack(4), most=4),
    "relaxed layers": lambda: SomeLayers(None, most=3, action=InGroups(2)),
    "a relaxed model": lambda: SecondModel(random_stack(4), most=4, action=InGroups(2)),
    "a calibrated model": lambda: SecondModel(random_stack(4), most=4, action=InGroups(2), calibrate=True),
}
TIGHT = {"cache_tokens": 96, "step_tokens": 24, "block": 4}


def test_accepted_are_the_guesses_that_were_drawn() -> None:
    assert accepted([], [3]) == 0
    assert accepted([3, 4, 5], [3, 4, 6, 7]) == 2
    assert accepted([3, 4], [3, 4, 9]) == 2
    assert accepted([1, 4], [3, 4, 9]) == 0


@pytest.mark.parametrize("tight", [False, True])
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_every_token_is_the_one_without_guesses(stack: DecoderStack, drafter: str, tight: bool) -> None:
    asked = [*prompts(5), [1, 2, 3] * 9]
    params = [Params(max_tokens=14, temperature=index % 3 / 2, seed=index, frequency_penalty=index % 2 / 4)
              for index in range(6)]
    engine = Engine(stack, drafter=DRAFTERS[drafter](), **TIGHT if tight else {"cache_tokens": 2048})  # type: ignore[arg-type]
    found = serve(engine, asked, params)
    for completion, prompt, own in zip(found, asked, params, strict=True):
        assert list(completion.tokens) == drawn(stack, prompt, own)
    metrics = engine.metrics()
    assert 0 < metrics["accepted_tokens_total"] <= metrics["drafted_tokens_total"]
    if drafter in ("all layers", "the same model"):
        assert metrics["accepted_tokens_total"] >= 0.9 * metrics["drafted_tokens_total"]


@pytest.mark.parametrize("kind", ["windows", "shared", "no attention"])
def test_tables_of_any_kind(kind: str) -> None:
    stack, asked = KINDS[kind].stack(), prompts(4)
    for drafter in (Lookup(shortest=1), SomeLayers([0, len(stack) - 1], most=2)) if kind != "shared" else (Lookup(),):
        found = serve(Engine(stack, drafter=drafter, block=4), asked, Params(max_tokens=12, seed=0))
        assert [list(one.tokens) for one in found] == [drawn(stack, p, Params(max_tokens=12, seed=0)) for p in asked]


def test_the_law_of_what_is_drawn_is_that_of_the_model() -> None:
    """Pairs of tokens over many seeds against the exact probabilities; the guesses are right now and then."""
    stack, prompt = random_stack(2, vocabulary=7, hidden=16), [1, 2, 3]
    count = 3000
    params = [Params(max_tokens=2, temperature=1.0, seed=seed) for seed in range(count)]
    engine = Engine(stack, drafter=SomeLayers([0], most=1), running=256, step_tokens=4096)
    pairs = Counter(completion.tokens for completion in engine.generate([prompt] * count, params))
    first_V = stack(torch.tensor([prompt]))[0, -1].softmax(-1)
    second_VV = torch.stack([stack(torch.tensor([[*prompt, token]]))[0, -1].softmax(-1) for token in range(7)])
    exact_VV = first_V[:, None] * second_VV
    found_VV = torch.tensor([[pairs[a, b] / count for b in range(7)] for a in range(7)])
    chi2 = float(((found_VV - exact_VV) ** 2 / exact_VV).sum() * count)
    assert chi2 < 84  # the 99.9th percentile of 48 degrees of freedom is 84.0


def test_stop_tokens_among_guesses_end_the_request(stack: DecoderStack) -> None:
    whole = drawn(stack, [5, 6], Params(max_tokens=12, seed=0))
    stop = next(token for token in whole[3:] if token not in whole[:3])
    engine = Engine(stack, drafter=SomeLayers(None, most=8))
    found, = serve(engine, [[5, 6]], Params(max_tokens=12, stop_ids=(stop,)))
    assert list(found.tokens) == whole[: whole.index(stop) + 1] and found.finish == "stop"


def test_lookup_continues_what_came_before(stack: DecoderStack) -> None:
    from layerwise.serve.drafts import _Seen

    seen = _Seen(2, 3)
    assert seen.after([1, 2, 3, 4, 9, 2, 3], 3) == [4, 9, 2]
    assert seen.after([1, 2, 3, 4, 9, 2, 3, 8, 2, 3], 2) == [8, 2]
    assert _Seen(2, 2).after([5, 1, 1, 1], 5) == [1, 1, 1, 1, 1]
    assert _Seen(2, 3).after([1, 2, 3], 3) == []


def test_drafters_that_do_not_fit_are_refused(stack: DecoderStack) -> None:
    for layers in ([], [3, 1], [9]):
        with pytest.raises(BadOption, match="guesses from the layers"):
            Engine(stack, drafter=SomeLayers(layers))
    with pytest.raises(BadOption, match="7 tokens"):
        Engine(stack, drafter=SecondModel(random_stack(2, vocabulary=7)))
    budgets = layer_table(stack.spec, budgets=dict.fromkeys(range(4), 8))
    with pytest.raises(BadOption, match="in full"):
        Engine(stack, table=budgets, drafter=SecondModel(random_stack(2)))


def test_lookup_guesses_as_many_as_come_true() -> None:
    request = Request(tuple([1, 2, 3, 4, 5, 6, 7, 8] * 3), Params())
    sequence = Sequence(request, 0, 64, 0, [])
    row, lookup = Row(sequence, 23, 1, 1, range(1), room=8), Lookup(most=8)
    sizes = []
    for right in (2, 3, 0, 1, 2, 4, 8):
        lookup.draft([row])
        sizes.append(len(row.drafts))
        sequence.drafted += len(row.drafts)
        sequence.accepted += min(right, len(row.drafts))
    assert sizes == [8, 3, 6, 1, 2, 4, 8]
