"""What steps read, against counts by hand and against running the router again."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from layerwise.measure.hardware import Machine
from layerwise.serve.engine import Engine, layered
from layerwise.serve.meter import Meter, Work, expert_bytes, layer_bytes, loaded, looked_at, seconds
from layerwise.serve.request import Params
from layerwise.spec import FeedForward
from layerwise.stack.decoder import DecoderStack
from layerwise.testing.stacks import random_stack
from tests.serve.plain import FULL, NARROW, greedy

MIXED = replace(FULL, feed_forward=FeedForward(16, experts=6, experts_per_token=2))


def mixed(layers: int = 4) -> DecoderStack:
    return random_stack(layers, row=MIXED)


def prompt(size: int) -> list[int]:
    return torch.randint(97, (size,), generator=torch.Generator().manual_seed(size)).tolist()


@pytest.mark.parametrize("window", [None, 1, 3, 50])
@pytest.mark.parametrize(("start", "size"), [(0, 1), (0, 7), (2, 5), (9, 4), (9, 1)])
def test_keys_and_pairs_are_those_of_a_mask(start: int, size: int, window: int | None) -> None:
    query_T1, key_S = torch.arange(start, start + size)[:, None], torch.arange(start + size)
    seen_TS = (key_S <= query_T1) & (key_S > query_T1 - (window or 1000))
    assert looked_at(start, size, window) == (int(seen_TS.any(0).sum()), int(seen_TS.sum()))


def test_a_step_notes_every_layer_once() -> None:
    meter = Meter()
    engine = Engine(mixed(), action=meter, cache_tokens=256, step_tokens=64)
    tokens = [list(one.tokens) for one in engine.generate([prompt(9), prompt(5)], Params(max_tokens=1, stop_ids=()))]
    work = meter.take()
    assert [each.layer for each in work] == [0, 1, 2, 3] and meter.take() == []
    assert {(each.tokens, each.keys, each.pairs) for each in work} == {(14, 14, 45 + 15)}
    assert tokens == [greedy(engine.stack, given, 1) for given in (prompt(9), prompt(5))]


def test_experts_are_those_that_the_router_chose() -> None:
    stack = mixed(1)
    block, x_1NC = stack.block(0), torch.randn(1, 3, 64, generator=torch.Generator().manual_seed(0))
    with loaded(block) as found:
        block.feed_forward(x_1NC)
    logits_NE = block.feed_forward.body.router(block.feed_forward.norm(x_1NC[0]))
    assert found == set(logits_NE.topk(2).indices.flatten().tolist())
    before = set(found)
    block.feed_forward(x_1NC * -1)
    assert found == before
    with loaded(random_stack(1).block(0)) as none:
        assert none == set()


def test_layered_prompts_load_each_layer_once() -> None:
    loads = {}
    for name, options in {"chunked": {}, "layered": {"groups": layered(8)}}.items():
        meter = Meter()
        engine = Engine(mixed(), action=meter, cache_tokens=256, running=4, step_tokens=8, **options)  # type: ignore[arg-type]
        engine.generate([prompt(32)], Params(max_tokens=1, stop_ids=()))
        loads[name] = [(each.layer, each.tokens) for each in meter.take()]
    assert loads["layered"] == [(layer, 32) for layer in range(4)]
    assert loads["chunked"] == [(layer, 8) for layer in range(4)] * 4


def test_bytes_and_seconds_by_hand() -> None:
    spec = mixed(2).spec
    expert, work = 3 * 16 * 64 * 4, [Work(0, 3, 5, 9, 4), Work(1, 1, 5, 5, 2)]
    rest = spec.rows[0].bytes(64, "float32") - 6 * expert
    assert expert_bytes(spec, work) == 6 * expert
    assert layer_bytes(spec, work) == 2 * rest + 6 * expert
    keys = 2 * 2 * 16 * 4
    assert seconds(spec, work, Machine(1e30, 1.0)) == pytest.approx(2 * rest + 6 * expert + keys * (5 + 3 + 5 + 1))
    matrices = 2 * 64 * 64 + 2 * 32 * 64 + 2 * 3 * 16 * 64 + 6 * 64
    assert seconds(spec, work[:1], Machine(1.0, 1e30)) == 2 * 3 * matrices + 4 * 64 * 9


def test_a_dense_layer_has_no_experts() -> None:
    spec = random_stack(1, row=NARROW).spec
    assert expert_bytes(spec, [Work(0, 3, 3, 6, 0)]) == 0
    assert layer_bytes(spec, [Work(0, 3, 3, 6, 0)]) == spec.rows[0].bytes(64, "float32")
