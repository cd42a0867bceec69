"""Traces and paces by hand, and the system from end to end."""

from __future__ import annotations

import pytest

from layerwise.serve.engine import whole
from layerwise.systems.mixture import mixture
from layerwise.systems.serve.layered_prefill import SCALES, _beside_a_stream, _pace, _requests, _run
from layerwise.systems.sizes import byte_blocks
from layerwise.testing import check_system

SCALE = SCALES["quick"]


def test_paces_are_those_of_a_stream() -> None:
    training, held = byte_blocks(0, blocks=60)
    stack = mixture(training, layers=2, experts=4, chosen=1, steps=0)
    asked = _requests(SCALE, "short", held, 0)
    assert [request.prompt for request in asked] == [request.prompt for request in _requests(SCALE, "short", held, 0)]
    pace = _pace(stack, asked, (SCALE.chunk, whole))
    once, spread = (_run(stack, asked, (SCALE.chunk, whole), each) for each in (0.0, pace))
    assert [one.tokens for one in once.served] == [one.tokens for one in spread.served]
    assert all(one.arrival == 0 for one in once.served)
    assert spread.served[0].arrival < spread.served[-1].arrival
    assert _beside_a_stream(asked, SCALE)[0].params.max_tokens > 40


@pytest.mark.slow
def test_it_runs() -> None:
    tokens, fewer, paper, gain, *times, formula = check_system("layered-prefill")
    assert tokens.holds is True and tokens.control["plain passes with one more expert a token"] < 1
    assert fewer.holds is paper.holds is gain.holds is formula.holds is None
    assert len(times) == 3 and all(check.holds is None for check in times)
    assert gain.measured["fewer bytes of weights than chunked, dense"] == 0
    less = fewer.measured["fewer bytes of experts than chunked"]
    assert 0 < less["long"] <= fewer.control["fewer bytes of experts than chunked"]["long"]["whole prompts"]
