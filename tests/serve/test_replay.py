"""Requests on a clock: who waits for whom, and how long."""

from __future__ import annotations

import torch

from layerwise.serve.engine import Engine
from layerwise.serve.replay import replay
from layerwise.serve.request import Params, Request
from layerwise.testing.stacks import random_stack
from tests.serve.plain import greedy


def test_times_by_hand() -> None:
    stack = random_stack(2)
    asked = [Request((1, 2, 3), Params(max_tokens=3, stop_ids=())), Request((4,), Params(max_tokens=2, stop_ids=())),
             Request((5,), Params(max_tokens=1, stop_ids=()))]
    one, two, three = replay(Engine(stack, cache_tokens=64), asked, [0.0, 0.5, 10.0], lambda: 1.0)
    assert (one.times, two.times, three.times) == ([1, 2, 3], [2, 3], [11])
    assert (one.first, two.first, two.whole, one.gaps) == (1.0, 1.5, 2.5, [1.0, 1.0])
    assert [served.tokens for served in (one, two, three)] == [
        greedy(stack, request.prompt, request.params.max_tokens) for request in asked]


def test_when_they_come_changes_no_token() -> None:
    stack, draw = random_stack(3), torch.Generator().manual_seed(0)
    asked = [Request(tuple(torch.randint(97, (9,), generator=draw).tolist()), Params(max_tokens=4, stop_ids=()))
             for _ in range(5)]
    runs = [replay(Engine(stack, cache_tokens=256, step_tokens=64), asked, [pace * place for place in range(5)],
                   lambda: 1.0) for pace in (0.0, 0.7, 9.0)]
    assert len({str([served.tokens for served in run]) for run in runs}) == 1
    assert [max(one.first for one in run) for run in runs][2] == 1.0
