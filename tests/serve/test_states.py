"""Layers that keep a state: one slot for each running sequence, begun anew, never shared, never taken back."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from layerwise.allocate.apply import apply
from layerwise.allocate.plan import Edit, Plan
from layerwise.errors import BadOption
from layerwise.serve.drafts import Lookup
from layerwise.serve.engine import Engine, layered
from layerwise.serve.model_drafts import SecondModel, SomeLayers
from layerwise.serve.rehearse import rehearse
from layerwise.serve.request import Params, Request
from layerwise.serve.scheduler import Limits
from layerwise.serve.states import StatePool
from layerwise.serve.table import layer_table
from layerwise.spec import Format
from layerwise.stack.decoder import DecoderStack
from tests.serve.plain import FULL, KINDS, STATE, Kind, greedy, prompts, serve

MIXER: Any = STATE.mixer


@pytest.fixture(scope="module")
def hybrid() -> DecoderStack:
    return KINDS["hybrid"].stack()


def test_the_table_names_one_group_of_states(hybrid: DecoderStack) -> None:
    table = layer_table(hybrid.spec, precision="int8")
    assert [entry.kind for entry in table.layers] == ["recurrent", "full", "recurrent", "window"]
    states = table.groups[table.layers[0].group or 0]
    assert (states.layers, states.token_bytes, states.state_bytes) == ((0, 2), 0, 2 * MIXER.state_bytes("float32"))
    assert table.is_recurrent and not layer_table(KINDS["full"].stack().spec).is_recurrent


def test_no_budget_for_a_state(hybrid: DecoderStack) -> None:
    with pytest.raises(BadOption, match="a budget of 5 tokens for layer 0"):
        layer_table(hybrid.spec, budgets={0: 5})


def test_slots_are_read_written_and_begun_anew() -> None:
    pool = StatePool(4, MIXER, torch.bfloat16, torch.device("cpu"))
    slots = torch.tensor([2, 0])
    kept = tuple(torch.randn(2, *shape) for shape in MIXER.kept)
    pool.write(slots, kept)
    tail, state = pool.read(torch.tensor([0, 1, 2]), None)
    assert tail.dtype == torch.bfloat16 and torch.equal(state[[2, 0]], kept[1])
    assert not state[1].any()
    assert not any(found[0].any() for found in pool.read(slots, torch.tensor([True, False])))
    assert torch.equal(pool.read(slots, torch.tensor([True, False]))[1][1], kept[1][1])


def test_slots_are_used_again_by_others(hybrid: DecoderStack) -> None:
    engine = Engine(hybrid, running=2, cache_tokens=512)
    asked = prompts(9)
    found = serve(engine, asked, Params(max_tokens=6))
    assert [list(one.tokens) for one in found] == [greedy(hybrid, prompt, 6) for prompt in asked]
    assert [pool.count for pool in engine.caches.pools].count(2) == 1
    assert all(pool.free == pool.count for pool in engine.caches.pools)


def test_as_many_sequences_run_as_there_are_states(hybrid: DecoderStack, monkeypatch: pytest.MonkeyPatch) -> None:
    size = sum(group.state_bytes for group in layer_table(hybrid.spec).groups)
    monkeypatch.setattr("layerwise.serve.engine._free", lambda stack: 4 * 3 * size)
    engine = Engine(hybrid, running=8, cache_tokens=512)
    for prompt in prompts(6):
        engine.add(Request(tuple(prompt), Params(max_tokens=4)))
    most = 0
    while engine.busy:
        engine.step()
        engine.check_integrity()
        most = max(most, len(engine.scheduler.running))
    assert most == 3


@pytest.mark.parametrize("setting", [{"step_tokens": 7, "running": 4}, {"groups": layered(20)}, {"cache_tokens": 96}])
def test_cancelling_others_changes_nothing(hybrid: DecoderStack, setting: dict[str, Any]) -> None:
    engine = Engine(hybrid, **{"cache_tokens": 256, "block": 4} | setting)
    requests = [Request(tuple(prompt), Params(max_tokens=8)) for prompt in prompts(8)]
    found: dict[str, list[int]] = {request.id: [] for request in requests}
    for request in requests:
        engine.add(request)
    for turn in range(1000):
        if turn < len(requests) and turn % 2:
            engine.cancel(requests[turn].id)
        for event in engine.step():
            found[event.id] += event.tokens
        engine.check_integrity()
        if not engine.busy:
            break
    for turn, request in enumerate(requests):
        expected = greedy(hybrid, request.prompt, 8)
        assert found[request.id] == (expected if turn % 2 == 0 else expected[: len(found[request.id])])


def test_no_prefix_is_shared(hybrid: DecoderStack) -> None:
    engine = Engine(hybrid, cache_tokens=512)
    prompt = prompts(1)[0] * 2
    first, second = (serve(engine, [prompt], Params(max_tokens=5))[0] for _ in range(2))
    assert engine.caches.tree is None and second.usage.cached == 0 and first.tokens == second.tokens


def test_pure_states_need_no_blocks_for_tokens() -> None:
    stack = KINDS["recurrent"].stack()
    engine = Engine(stack, cache_tokens=16)
    assert engine.longest == stack.spec.context
    prompt = (prompts(2)[1] * 9)[:200]
    assert list(serve(engine, [prompt], Params(max_tokens=5))[0].tokens) == greedy(stack, prompt, 5)


def test_tokens_may_pass_recurrent_layers_by(hybrid: DecoderStack) -> None:
    engine = Engine(hybrid, table=layer_table(hybrid.spec, skip=[2]), cache_tokens=512, step_tokens=9)
    alone = Engine(hybrid, table=layer_table(hybrid.spec, skip=[2]), cache_tokens=512, running=1)
    asked = prompts(5)
    assert [one.tokens for one in serve(engine, asked, Params(max_tokens=6))] == \
           [one.tokens for one in serve(alone, asked, Params(max_tokens=6))]


@pytest.mark.parametrize("drafter", [Lookup(), SomeLayers([0])])
def test_guesses_are_refused(hybrid: DecoderStack, drafter: Any) -> None:
    with pytest.raises(BadOption, match="some of whose layers keep a state"):
        Engine(hybrid, cache_tokens=64, drafter=drafter)


def test_guesses_from_a_recurrent_model_are_refused(hybrid: DecoderStack) -> None:
    with pytest.raises(BadOption, match="guesses from"):
        Engine(KINDS["full"].stack(), cache_tokens=64, drafter=SecondModel(hybrid))


def test_rehearsals_take_the_steps_of_the_engine(hybrid: DecoderStack) -> None:
    limits = Limits(running=3, step_tokens=30)
    requests = [Request(tuple(prompt), Params(max_tokens=5, stop_ids=())) for prompt in prompts(7)]
    rehearsed = rehearse(layer_table(hybrid.spec), requests, limits, cache_tokens=256)
    engine = Engine(hybrid, running=3, step_tokens=30, cache_tokens=256)
    for request in requests:
        engine.add(request)
    while engine.busy:
        engine.step()
    assert engine.counts.steps == len(rehearsed.steps)


def test_factored_and_packed_matrices_are_served() -> None:
    row = replace(STATE, ranks={"in_proj": 40, "out_proj": 30})
    stack = Kind((row, FULL)).stack()
    asked = prompts(4)
    assert [list(one.tokens) for one in serve(Engine(stack, cache_tokens=256), asked, Params(max_tokens=5))] == \
           [greedy(stack, prompt, 5) for prompt in asked]
    edits = [Edit(layer, "quantize", {"bits": 8, "group": 32}) for layer in (0, 2)]
    hybrid = KINDS["hybrid"].stack()
    packed = apply(hybrid, Plan(hybrid.spec.fingerprint(), 4, tuple(edits)))
    assert packed.spec.rows[0].formats == {"in_proj": Format(8, 32, True), "out_proj": Format(8, 32, True)}
    assert [list(one.tokens) for one in serve(Engine(packed, cache_tokens=256), asked, Params(max_tokens=5))] == \
           [greedy(packed, prompt, 5) for prompt in asked]
