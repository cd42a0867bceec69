"""A rehearsal takes the steps that the engine takes."""

from __future__ import annotations

import pytest

from layerwise.errors import BadOption
from layerwise.serve.engine import Engine
from layerwise.serve.rehearse import Step, rehearse
from layerwise.serve.request import Params, Request
from layerwise.serve.scheduler import Limits
from layerwise.serve.table import layer_table
from tests.serve.plain import KINDS, prompts


def requests(count: int, written: int = 8) -> list[Request]:
    return [Request(tuple(prompt), Params(max_tokens=written + index % 3, stop_ids=()))
            for index, prompt in enumerate(prompts(count))]


def test_steps_by_hand() -> None:
    found = rehearse(layer_table(KINDS["full"].stack().spec), [Request((1,) * 5, Params(max_tokens=3))],
                     Limits(4, 4), cache_tokens=64)
    assert found.steps == [Step(4, 4, 0, 4), Step(1, 1, 1, 5), Step(1, 0, 1, 6), Step(1, 0, 1, 7)]
    assert (found.prompt, found.tokens, found.saved) == (5, 7, 0.0)


@pytest.mark.parametrize("kind", ["full", "windows", "shared"])
@pytest.mark.parametrize("limits", [Limits(4, 16), Limits(8, 40, groups=lambda tokens: -(-tokens // 20))])
@pytest.mark.parametrize("cache_tokens", [96, 1024])
def test_the_engine_takes_the_same_steps(kind: str, limits: Limits, cache_tokens: int) -> None:
    stack, asked = KINDS[kind].stack(), requests(12)
    engine = Engine(stack, cache_tokens=cache_tokens, block=4, running=limits.running, step_tokens=limits.step_tokens,
                    groups=limits.groups)
    engine.generate([request.prompt for request in asked], [request.params for request in asked])
    found = rehearse(engine.table, asked, limits, cache_tokens=cache_tokens, block=4)
    metrics = engine.metrics()
    assert len(found.steps) == metrics["steps_total"]
    assert found.tokens == metrics["step_tokens_total"]
    assert found.preemptions == metrics["preemptions_total"]
    assert (found.preemptions > 0) == (cache_tokens == 96) or kind == "windows"


def test_promised_room_spares_preemptions() -> None:
    table, asked = layer_table(KINDS["full"].stack().spec), requests(12, written=20)
    plain, promised = (rehearse(table, asked, Limits(8, 64, promise=promise), cache_tokens=128, block=4)
                       for promise in (False, True))
    assert plain.preemptions > 0 == promised.preemptions
    assert plain.prompt == promised.prompt


def test_what_cannot_fit_is_refused() -> None:
    with pytest.raises(BadOption, match="larger cache"):
        rehearse(layer_table(KINDS["full"].stack().spec), [Request((1,) * 60, Params(max_tokens=9))], Limits(),
                 cache_tokens=64)


def test_ends_are_told_in_order_of_ending() -> None:
    ended: list[int] = []
    asked = [Request((place,) * 4, Params(max_tokens=written)) for place, written in enumerate((5, 1, 3))]
    rehearse(layer_table(KINDS["full"].stack().spec), asked, Limits(), cache_tokens=64, done=ended.append)
    assert ended == [1, 2, 0]
