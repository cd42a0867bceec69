"""The engine gives every request what a plain run gives it, however steps are cut and whoever shares them."""

from __future__ import annotations

import dataclasses
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import layerwise as lw
from layerwise.allocate.apply import apply
from layerwise.allocate.plan import Edit, Plan
from layerwise.errors import BadData, BadModel, BadOption
from layerwise.nets.wide import may_pair
from layerwise.serve.engine import Engine, layered
from layerwise.serve.request import Params, QueueFull, Request, TooLong
from layerwise.serve.table import layer_table
from layerwise.spec import Attention, FeedForward, Format, LayerSpec, Precision, Tiers
from layerwise.stack import ModuleStack
from layerwise.stack.decoder import DecoderStack
from layerwise.testing.stacks import random_stack
from layerwise.transform.quantize import pack_table, values
from tests.nets.tiny import tiny, write
from tests.serve.plain import KINDS, drawn, greedy, prompts, serve

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "alone": {"running": 1},
    "chunked": {"step_tokens": 7, "running": 4},
    "preempted": {"cache_tokens": 72, "prefix_cache": False, "block": 4},
    "preempted with prefixes": {"cache_tokens": 72, "step_tokens": 24, "block": 4},
    "small blocks": {"block": 3},
    "layered": {"groups": layered(9)},
    "layered and preempted": {"groups": layered(9), "cache_tokens": 72, "block": 4},
}


@cache
def answers(kind: str) -> tuple[DecoderStack, list[list[int]], list[Params], list[list[int]]]:
    """A stack, prompts, parameters (every other request samples), and the tokens of plain runs."""
    stack, asked = KINDS[kind].stack(), prompts(6)
    params = [Params(max_tokens=10, temperature=0.0 if index % 2 else 1.0, seed=index) for index in range(6)]
    return stack, asked, params, [drawn(stack, *pair) for pair in zip(asked, params, strict=True)]


@pytest.mark.parametrize("setting", [{}, {"step_tokens": 64}, {"running": 3}, {"prefix_cache": False}])
def test_in_bfloat16_a_request_does_not_depend_on_its_mates(setting: dict[str, Any]) -> None:
    """The same bits in bfloat16, however steps are cut, whoever shares them, and with beginnings from the cache."""
    if not may_pair(torch.zeros(1, 1, dtype=torch.bfloat16)):
        pytest.skip("no instructions for pairs of bfloat16 here")
    row = LayerSpec(Attention(heads=4, kv_heads=2, head_dim=64), FeedForward(width=192))
    stack = random_stack(3, hidden=128, vocabulary=192, dtype="bfloat16", row=row)
    asked = [prompt * size for prompt, size in zip(prompts(6, vocabulary=192), (1, 4, 4, 1, 2, 2), strict=True)]
    params = Params(max_tokens=6, temperature=0.0, logprobs=2)
    fast = Engine(stack, cache_tokens=2048, **setting)
    alone = [serve(Engine(stack, cache_tokens=2048, prefix_cache=False), [prompt], params)[0] for prompt in asked]
    for one, mate in zip(alone, serve(fast, asked, params), strict=True):
        assert one.tokens == mate.tokens and one.logprobs == mate.logprobs


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("setting", SETTINGS)
def test_tokens_are_those_of_plain_runs(kind: str, setting: str) -> None:
    stack, asked, params, expected = answers(kind)
    engine = Engine(stack, **{"cache_tokens": 2048} | SETTINGS[setting])
    for completion, prompt, tokens in zip(serve(engine, asked, params), asked, expected, strict=True):
        assert list(completion.tokens) == tokens
        assert completion.finish == "length"
        assert completion.usage.prompt == len(prompt) and completion.usage.completion == 10
    if "preempted" in setting and kind in ("full", "windows", "shared"):
        assert engine.metrics()["preemptions_total"] > 0


@pytest.mark.parametrize("case", ["llama", "gpt2", "gemma3", "qwen2-sliding", "qwen3-moe", "mistral-sliding",
                                  "mamba2", "bamba"])
def test_greedy_tokens_are_those_of_transformers(case: str, tmp_path: Path) -> None:
    theirs = tiny(case)
    stack = lw.open(write(theirs, tmp_path / case))
    asked = prompts(6, 131)
    found = serve(Engine(stack, cache_tokens=512, step_tokens=50), asked, Params(max_tokens=10, stop_ids=()))
    for completion, prompt in zip(found, asked, strict=True):
        ids = torch.tensor([prompt])
        whole = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False,
                                eos_token_id=None, pad_token_id=0)
        assert list(completion.tokens) == whole[0, len(prompt) :].tolist()


def test_known_prefixes_are_not_computed_again(stack: DecoderStack) -> None:
    engine = Engine(stack, cache_tokens=2048)
    prompt = prompts(1)[0] * 2
    first, = serve(engine, [prompt], Params(max_tokens=8))
    second, third = serve(engine, [prompt, [*prompt, *first.tokens, 5]], Params(max_tokens=8))
    assert first.usage.cached == 0
    assert second.usage.cached == (len(prompt) - 1) // 16 * 16 and second.tokens == first.tokens
    assert third.usage.cached == (len(prompt) + 7) // 16 * 16
    assert list(third.tokens) == greedy(stack, third.prompt, 8)


def test_nothing_is_published_before_every_layer_wrote_it(stack: DecoderStack, mixed: list[list[int]]) -> None:
    engine = Engine(stack, cache_tokens=2048, block=4, step_tokens=15, groups=layered(9))
    for prompt in mixed:
        engine.add(Request(tuple(prompt), Params(max_tokens=6)))
    tree, passing = engine.caches.tree, 0
    assert tree is not None
    while engine.busy:
        engine.step()
        passing += bool(engine.runner.frontiers)
        blocks_1M = torch.tensor([[node.blocks[0] for node in tree.nodes()]], dtype=torch.int64)
        for pool in engine.runner.pools:  # caches begin as zeros, and no key is
            assert pool is not None and bool((pool.gather(blocks_1M)[0] != 0).any(-1).all())
    assert passing > 3 and tree.size > 50


def test_requests_with_one_beginning_wait_for_the_first(stack: DecoderStack) -> None:
    engine = Engine(stack, cache_tokens=2048)
    beginning = list(range(64))
    asked = [[*beginning, index] for index in range(6)]
    found = serve(engine, asked, Params(max_tokens=4))
    assert [completion.usage.cached for completion in found] == [0, *[64] * 5]
    assert [list(completion.tokens) for completion in found] == [greedy(stack, prompt, 4) for prompt in asked]


def test_a_token_table_in_two_formats(stack: DecoderStack, mixed: list[list[int]]) -> None:
    format, order_V = Tiers(20, Format(8, 0, True), Format(4, 32)), torch.arange(stack.spec.vocabulary).flip(0)
    table = pack_table(values(stack.decoder.embedding), format, "search", order_V=order_V)
    slim = stack.with_tables(dataclasses.replace(stack.spec, embedding_format=format), embedding=table)
    found = serve(Engine(slim, cache_tokens=2048), mixed, Params(max_tokens=4))
    assert [list(completion.tokens) for completion in found] == [greedy(slim, prompt, 4) for prompt in mixed]


def test_cancelling_others_changes_nothing(stack: DecoderStack, mixed: list[list[int]]) -> None:
    engine = Engine(stack, cache_tokens=256, step_tokens=30, groups=layered(20))
    requests = [Request(tuple(prompt), Params(max_tokens=10)) for prompt in mixed]
    found: dict[str, list[int]] = {request.id: [] for request in requests}
    ended = {}
    for request in requests:
        engine.add(request)
    for turn in range(1000):
        if turn < len(requests) and turn % 2:
            engine.cancel(requests[turn].id)
        engine.check_integrity()
        for event in engine.step():
            found[event.id] += event.tokens
            ended[event.id] = event.finish or ended.get(event.id)
        engine.check_integrity()
        if not engine.busy:
            break
    for turn, request in enumerate(requests):
        expected = greedy(stack, request.prompt, 10)
        assert found[request.id] == expected[: len(found[request.id])]
        assert ended[request.id] == ("cancelled" if turn % 2 and len(found[request.id]) < 10 else "length")
    assert set(ended.values()) == {"cancelled", "length"}
    assert not engine.runner.frontiers


def test_generated_tokens_pass_skipped_layers_by(stack: DecoderStack, mixed: list[list[int]]) -> None:
    from layerwise.generate.sample import next_logits
    from layerwise.stack.decoder import Caches

    def reference(prompt: list[int]) -> list[int]:
        caches: Caches = {}
        tokens = [int(next_logits(stack, torch.tensor([prompt]), caches).argmax())]
        while len(tokens) < 9:
            tokens.append(int(next_logits(stack, torch.tensor([tokens[-1:]]), caches, (0, 2, 3)).argmax()))
        return tokens

    table = layer_table(stack.spec, skip=[1])
    for setting in SETTINGS.values():
        engine = Engine(stack, table=table, **{"cache_tokens": 2048} | setting)
        found = serve(engine, mixed[:5], Params(max_tokens=9))
        assert [list(completion.tokens) for completion in found] == [reference(prompt) for prompt in mixed[:5]]


def test_generous_budgets_change_nothing(stack: DecoderStack, mixed: list[list[int]]) -> None:
    engine = Engine(stack, table=layer_table(stack.spec, budgets={1: 100, 3: 90}), cache_tokens=1024, step_tokens=33)
    found = serve(engine, mixed[:4], Params(max_tokens=9))
    assert [list(completion.tokens) for completion in found] == [greedy(stack, prompt, 9) for prompt in mixed[:4]]


@pytest.mark.parametrize("scorer", ["recent", "norm", "attention"])
def test_tight_budgets_bound_the_cache(stack: DecoderStack, scorer: Any) -> None:
    table = layer_table(stack.spec, budgets={1: 20, 3: 8}, scorer=scorer)
    engine = Engine(stack, table=table, cache_tokens=512, block=4)
    engine.add(Request(tuple(range(60)), Params(max_tokens=40)))
    for _ in range(30):
        engine.step()
        engine.check_integrity()
        sequence, = engine.scheduler.running
        held = [len(table.blocks) * 4 for table in sequence.tables]
        budgets = [entry.tokens for entry in engine.table.groups]
        assert all(budget is None or tokens <= budget + 8 for tokens, budget in zip(held, budgets, strict=True))
    assert sequence.tables[1].kept == sorted(set(sequence.tables[1].kept))


@pytest.mark.parametrize("setting", ["plain", "chunked", "preempted", "layered"])
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_coded_caches_are_what_a_plain_pass_over_coded_keys_sees(precision: Precision, setting: str) -> None:
    stack, asked = random_stack(2), prompts(5, seed=2)
    stack.decoder.double()  # so exact that the order of sums changes no code

    coded = apply(stack, Plan(stack.spec.fingerprint(), 2, tuple(
        Edit(layer, "cache-precision", {"precision": precision}) for layer in range(2))))
    table = layer_table(stack.spec, precision=precision)
    engine = Engine(stack, table=table, **{"cache_tokens": 1024} | SETTINGS[setting])
    assert layer_table(coded.spec) == table
    found = serve(engine, asked, Params(max_tokens=6, prompt_logprobs=True))
    for completion, prompt in zip(found, asked, strict=True):
        tokens_T = torch.tensor([*prompt, *completion.tokens])
        logs_TV = coded(tokens_T[None])[0].log_softmax(-1)
        expected = logs_TV[:-1].gather(1, tokens_T[1:, None])[:, 0]
        scores = torch.tensor([score.logprob for score in completion.prompt_logprobs])
        torch.testing.assert_close(scores, expected.float()[: len(scores)], rtol=0, atol=1e-5)
        assert list(completion.tokens) == logs_TV[len(prompt) - 1 : -1].argmax(-1).tolist()


@pytest.mark.parametrize("setting", SETTINGS)
def test_scores_of_prompts_are_those_of_a_whole_pass(stack: DecoderStack, setting: str) -> None:
    asked = prompts(5, seed=4)
    engine = Engine(stack, **{"cache_tokens": 1024, "prefix_cache": False} | SETTINGS[setting])
    found = serve(engine, asked, Params(max_tokens=2, prompt_logprobs=True, logprobs=3))
    for completion, prompt in zip(found, asked, strict=True):
        tokens = [*prompt, *completion.tokens]
        logs_TV = stack(torch.tensor([tokens]))[0].log_softmax(-1)
        scores = [*completion.prompt_logprobs, *completion.logprobs]
        assert [score.token for score in scores] == tokens[1:]
        expected = logs_TV[torch.arange(len(tokens) - 1), torch.tensor(tokens[1:])]
        torch.testing.assert_close(torch.tensor([score.logprob for score in scores]), expected, rtol=0, atol=1e-4)
        assert [score.top[0][0] for score in scores] == logs_TV[:-1].argmax(-1).tolist()
        assert all(len(score.top) == 3 for score in scores)


def test_a_prompt_can_be_scored_alone(stack: DecoderStack) -> None:
    found, = serve(Engine(stack), [[5, 6, 7]], Params(max_tokens=0, prompt_logprobs=True))
    assert found.tokens == () and len(found.prompt_logprobs) == 2 and found.finish == "length"


def test_it_ends_at_stop_tokens_and_full_contexts(stack: DecoderStack) -> None:
    whole = greedy(stack, [1, 2, 3], 12)
    engine = Engine(stack, cache_tokens=256)
    stopped, = serve(engine, [[1, 2, 3]], Params(max_tokens=12, stop_ids=(whole[3],)))
    assert list(stopped.tokens) == whole[: whole.index(whole[3]) + 1] and stopped.finish == "stop"
    full, = serve(engine, [[1] * 250], Params(max_tokens=99))
    assert len(full.tokens) == 256 - 250 + 1 and full.finish == "length"


def test_a_grammar_decides_what_may_come(stack: DecoderStack) -> None:
    class Digits:
        """Tokens 10 to 19, four of them."""

        def __init__(self, fails: bool = False) -> None:
            self.count, self.fails = 0, fails

        def mask(self, logits_V: torch.Tensor) -> None:
            if self.fails and self.count == 2:
                raise ValueError("broken")
            logits_V[:10] = logits_V[20:] = float("-inf")

        def accept(self, token: int) -> bool:
            self.count += 1
            return self.count == 4

    plain = Params(max_tokens=9)
    good, bad = (dataclasses.replace(plain, grammar=Digits(fails)) for fails in (False, True))
    first, second, third = serve(Engine(stack), [[1], [1], [1]], [good, bad, plain])
    assert len(first.tokens) == 4 and all(10 <= token < 20 for token in first.tokens) and first.finish == "stop"
    assert second.finish == "error" and len(second.tokens) == 2
    assert list(third.tokens) == greedy(stack, [1], 9)


def test_higher_priorities_go_first(stack: DecoderStack) -> None:
    engine = Engine(stack, running=1)
    for id, priority in (("a", 0), ("late", 5), ("urgent", -1)):
        engine.add(Request((1, 2), Params(max_tokens=2), priority, id))
    ended = [event.id for _ in range(8) for event in engine.step() if event.finish]
    assert ended == ["urgent", "a", "late"]


def test_waiting_counts(stack: DecoderStack) -> None:
    engine = Engine(stack, running=1)
    engine.scheduler.limits = dataclasses.replace(engine.scheduler.limits, patience=3)
    engine.add(Request((1,), Params(max_tokens=3), 2, "low"))
    ended = []
    for turn in range(40):
        engine.add(Request((1,), Params(max_tokens=2), 0, f"high-{turn}"))
        ended += [event.id for event in engine.step() if event.finish]
    assert "low" in ended


def test_what_cannot_be_served_is_refused(stack: DecoderStack) -> None:
    engine = Engine(stack, waiting=2, cache_tokens=64)
    with pytest.raises(TooLong, match="65 tokens") as error:
        engine.add(Request((1,) * 65))
    assert (error.value.tokens, error.value.limit) == (65, 64)
    for prompt in ((), (97,), (-1,)):
        with pytest.raises(BadData):
            engine.add(Request(prompt))
    with pytest.raises(BadData):
        engine.add(Request((1,), Params(logit_bias={97: 1.0})))
    engine.add(Request((1,), id="a"))
    with pytest.raises(BadOption, match="in use"):
        engine.add(Request((1,), id="a"))
    engine.add(Request((1,), id="b"))
    with pytest.raises(QueueFull):
        engine.add(Request((1,), id="c"))
    with pytest.raises(BadModel, match="ModuleStack"):
        Engine(ModuleStack(torch.nn.Sequential(*[torch.nn.Linear(4, 4) for _ in range(3)])))
    for option in ("running", "block", "step_tokens"):
        with pytest.raises(BadOption, match=option):
            Engine(stack, **{option: 0})


@pytest.mark.parametrize("stop_at", ["a prompt", "a step"])
def test_nothing_goes_on_after_an_interruption(
    stack: DecoderStack, stop_at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(stack, cache_tokens=128, groups=layered(9))
    asked = [[1, 2, 3], list(range(40)), [4] * (200 if stop_at == "a prompt" else 3)]
    if stop_at == "a step":
        run, steps = engine.runner.run, []

        def interrupted(*given: Any) -> Tensor:
            steps.append(1)
            if len(steps) == 3:
                raise KeyboardInterrupt
            return run(*given)

        monkeypatch.setattr(engine.runner, "run", interrupted)
    with pytest.raises(TooLong if stop_at == "a prompt" else KeyboardInterrupt):
        engine.generate(asked, Params(max_tokens=9))
    assert not engine.scheduler.running and not engine.scheduler.waiting
    engine.check_integrity()
    found, = serve(engine, [[1, 2, 3]], Params(max_tokens=9))
    assert list(found.tokens) == greedy(stack, [1, 2, 3], 9)


@pytest.mark.parametrize("option", [
    {"max_tokens": 0}, {"temperature": -1.0}, {"temperature": float("nan")}, {"top_p": 0.0}, {"top_p": 1.1},
    {"top_k": -1}, {"min_p": 2.0}, {"presence_penalty": float("inf")}, {"repetition_penalty": 0.0}, {"stop": ("",)},
    {"logprobs": 21}, {"logit_bias": {-1: 0.0}}])
def test_impossible_parameters_are_refused(option: dict[str, Any]) -> None:
    with pytest.raises(BadOption, match=next(iter(option))):
        Params(**option)
