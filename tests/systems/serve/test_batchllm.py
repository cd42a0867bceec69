"""The load by hand, and the system from end to end."""

from __future__ import annotations

import pytest

from layerwise.serve.grouping import Group
from layerwise.stack.decoder import DecoderStack
from layerwise.systems.serve.batchllm import SCALES, Load, _cache, _load, _orders
from layerwise.testing import check_system


def test_every_order_has_every_request_once() -> None:
    load = Load([[1] * 40 + [index, 3] for index in range(4)] + [[2] * 20], [5, 1, 1, 1, 9])
    orders = _orders(load, 0, draws=2)
    for groups in orders.values():
        assert sorted(index for group in groups for index in group.members) == list(range(5))
    assert orders["grouped"][0].members == (4,) and sorted(orders["grouped"][1].members) == [0, 1, 2, 3]
    assert orders["depth first"] == [Group(0, (index,)) for index in range(5)]
    assert _cache(load, 1.0) == max(42 + 3 * 10 + 20 + 17, 2 * 42 + 2 * 9)


def test_questions_about_a_document_begin_alike(small: DecoderStack) -> None:
    load = _load(small, SCALES["quick"], 0)
    assert load == _load(small, SCALES["quick"], 0) != _load(small, SCALES["quick"], 1)
    beginnings = {tuple(prompt[:40]) for prompt in load.prompts}
    assert len(beginnings) == SCALES["quick"].documents
    assert len({tuple(prompt[:32]) for prompt in load.prompts}) <= 4


@pytest.mark.usefixtures("small")
def test_it_runs() -> None:
    tokens, steps, reuse, level, order, batches, time = check_system("batchllm")
    assert tokens.holds is steps.holds is True
    assert tokens.control["tokens of the next request"] < 1
    assert reuse.holds is level.holds is order.holds is batches.holds is time.holds is None
    assert reuse.measured["share of prompt tokens not computed"] <= reuse.measured["possible"]
    assert level.control["first level only"] <= level.measured["share saved by one level, exact"]
    assert batches.measured["room promised"]["sent away"] == 0
