"""Where tensors lie: the runner's on one device whatever it is, and on a GPU the same tokens as on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import flex_attention

from layerwise.nets import flex
from layerwise.nets.decoder import Decoder
from layerwise.serve.engine import Engine, layered
from layerwise.serve.paged import PagedFlow
from layerwise.serve.plan import Entry
from layerwise.serve.request import Params
from layerwise.serve.runner import Runner
from layerwise.serve.sampler import Position, adjust, logprobs, probabilities, sample
from layerwise.serve.sequence import Row
from layerwise.serve.table import LayerTable, layer_table
from layerwise.spec import StackSpec
from layerwise.stack.decoder import DecoderStack
from layerwise.testing.stacks import random_stack
from tests.serve.plain import KINDS, greedy, prompts, serve

TABLES: dict[str, Callable[[StackSpec], LayerTable]] = {
    "windows": layer_table,
    "shared": layer_table,
    "coded": lambda spec: layer_table(spec, precision={0: "int8", 1: "int4"}),
    "skipped": lambda spec: layer_table(spec, skip=[1]),
}
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
STEPS: dict[str, dict[str, Any]] = {"chunked": {"step_tokens": 40}, "layered": {"groups": layered(9)}}


@pytest.mark.parametrize(("table", "steps"), [*((table, "chunked") for table in TABLES), ("windows", "layered")])
def test_no_step_mixes_devices(table: str, steps: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step runs once more on tensors of another device, which hold nothing and refuse to meet one of the CPU."""
    stack = KINDS.get(table, KINDS["full"]).stack()
    made = TABLES[table](stack.spec)
    engine = Engine(stack, table=made, cache_tokens=256, block=4, **STEPS[steps])
    run, forget, seen = engine.runner.run, engine.runner.forget, 0
    with FakeTensorMode() as fake:
        with torch.device("meta"):
            decoder = Decoder(stack.spec)
        decoder.load_state_dict({name: torch.empty(each.shape, dtype=each.dtype, device="meta")
                                 for name, each in decoder.state_dict().items()}, assign=True)
        twin = Runner(DecoderStack(decoder.requires_grad_(False).eval()), made, 64, 4)

    def both(rows: list[Row], plan: list[Entry]) -> torch.Tensor:
        nonlocal seen
        logits_PV = run(rows, plan)
        with fake:
            twin_PV = twin.run(rows, plan)
        assert twin_PV.is_meta and twin_PV.shape == logits_PV.shape
        seen += 1
        return logits_PV

    def forget_both(sequences: Any) -> None:
        forget(sequences)
        twin.forget(sequences)

    monkeypatch.setattr(engine.runner, "run", both)
    monkeypatch.setattr(engine.runner, "forget", forget_both)
    engine.generate(prompts(4), Params(max_tokens=2))
    assert seen > 2


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("kind", ["full", "windows"])
def test_blocks_read_where_they_are_give_the_same_tokens(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an NVIDIA GPU does, on the CPU and without the compiler."""
    stack, asked, calls = KINDS[kind].stack(), prompts(4), 0
    expected = [greedy(stack, prompt, 3) for prompt in asked]

    def attend(*given: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return flex.attend(*given)

    monkeypatch.setattr(flex, "runs", lambda *given: True)
    monkeypatch.setattr(flex, "compiled", lambda: attend)
    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(PagedFlow, "pages", lambda *given: None)
    engine = Engine(stack, cache_tokens=512, block=4, step_tokens=30)
    assert [list(answer.tokens) for answer in serve(engine, asked, Params(max_tokens=3, temperature=0.0))] == expected
    assert calls > 10


# on a GPU --------------------------------------------------------------------------------------------

def on_gpu(stack: DecoderStack) -> DecoderStack:
    copy = stack.copied()
    copy.decoder.to("cuda")
    return copy


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [*STEPS, "preempted"])
@pytest.mark.gpu
@NO_GPU
def test_tokens_on_a_gpu_are_those_on_the_cpu(kind: str, steps: str) -> None:
    stack, asked = KINDS[kind].stack(), prompts(6)
    options = STEPS.get(steps, {"cache_tokens": 72, "block": 4, "prefix_cache": False})
    params = [Params(max_tokens=10, temperature=index % 2, seed=index, frequency_penalty=index % 3 / 2,
                     repetition_penalty=1.0 + index % 2 / 5, top_p=0.9, logit_bias={3: 1.0}) for index in range(6)]
    found = Engine(on_gpu(stack), **{"cache_tokens": 512} | options).generate(asked, params)
    expected = Engine(stack, **{"cache_tokens": 512} | options).generate(asked, params)
    assert [one.tokens for one in found] == [one.tokens for one in expected]


@pytest.mark.parametrize("given", [
    {"precision": "int8"}, {"precision": "int4"}, {"budgets": {1: 12}, "scorer": "attention"},
    {"budgets": {0: 8}, "scorer": "norm"},
])  # fmt: skip
@pytest.mark.gpu
@NO_GPU
def test_tables_on_a_gpu_score_as_on_the_cpu(given: dict[str, Any]) -> None:
    stack, asked = random_stack(3), prompts(6)
    stack.decoder.double()  # so exact that the order of sums changes no code and no choice
    params = Params(max_tokens=12, prompt_logprobs=True, logprobs=2)
    both = [Engine(each, table=layer_table(stack.spec, **given), cache_tokens=512).generate(asked, params)
            for each in (on_gpu(stack), stack)]
    for ours, theirs in zip(*both, strict=True):
        scores = [torch.tensor([score.logprob for score in one.prompt_logprobs]) for one in (ours, theirs)]
        torch.testing.assert_close(*scores, rtol=0, atol=1e-3)


@pytest.mark.gpu
@NO_GPU
def test_half_precision_on_a_gpu_is_close() -> None:
    stack, asked = random_stack(3).copied(torch.bfloat16), prompts(6)
    params = Params(max_tokens=4, prompt_logprobs=True)
    both = [Engine(each, cache_tokens=512).generate(asked, params) for each in (on_gpu(stack), stack)]
    for ours, theirs in zip(*both, strict=True):
        scores = [torch.tensor([score.logprob for score in one.prompt_logprobs]) for one in (ours, theirs)]
        torch.testing.assert_close(*scores, rtol=0, atol=0.1)


@pytest.mark.gpu
@NO_GPU
def test_the_sampler_draws_the_same_on_a_gpu() -> None:
    logits_PV = 3 * torch.randn(40, 5000, generator=torch.Generator().manual_seed(0))
    rows = [Position(Params(temperature=index % 3 / 2, top_p=1 - index % 4 / 10, top_k=index % 5 * 20,
                            min_p=index % 2 / 50, presence_penalty=index % 2, repetition_penalty=1.1,
                            logit_bias={index: 2.0}), index, [5, 5, 9, index], 2) for index in range(40)]
    assert sample(logits_PV.cuda(), rows) == sample(logits_PV, rows)
    here, there = logits_PV.clone(), logits_PV.cuda()
    for index, row in enumerate(rows):
        adjust(here[index], row)
        adjust(there[index], row)
    torch.testing.assert_close(there.cpu(), here)
    warm = [index for index, row in enumerate(rows) if row.params.temperature]
    torch.testing.assert_close(probabilities(there[warm], [rows[index] for index in warm]).cpu(),
                               probabilities(here[warm], [rows[index] for index in warm]))
    ours, theirs = (logprobs(each, list(range(40)), [3] * 40) for each in (logits_PV.cuda(), logits_PV))
    assert [[token for token, _ in one.top] for one in ours] == [[token for token, _ in one.top] for one in theirs]
