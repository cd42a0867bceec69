"""Random requests and random cancellations: nothing leaks, and whoever is left gets the tokens of a plain run."""

from __future__ import annotations

import random
from functools import cache

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from layerwise.serve.drafts import Lookup
from layerwise.serve.engine import Engine, layered
from layerwise.serve.request import Event, Params, Request
from layerwise.stack.decoder import DecoderStack
from tests.serve.plain import FULL, NARROW, STATE, Kind, drawn

STACK = Kind((FULL, NARROW)).stack()
HYBRID = Kind((STATE, FULL)).stack()
ENGINES = [
    {"cache_tokens": 96, "block": 4, "step_tokens": 20, "running": 6},
    {"cache_tokens": 64, "block": 8, "prefix_cache": False},
    {"cache_tokens": 80, "block": 4, "groups": layered(6)},
    {"cache_tokens": 96, "block": 2, "step_tokens": 12, "drafter": Lookup(most=3, shortest=1)},
    {"cache_tokens": 72, "block": 4, "step_tokens": 14, "running": 5},
]
STACKS = [STACK, STACK, STACK, STACK, HYBRID]
BEGINNING = [7, 8, 9, 7, 8, 9, 1, 2, 3, 4, 5, 6]


def request(seed: int, priority: int = 0) -> Request:
    """A request that depends on a number only: short or long, alone or with a common beginning, greedy or drawn."""
    chance = random.Random(seed)
    own = [chance.randrange(97) for _ in range(chance.choice((1, 3, 9, 30)))]
    prompt = BEGINNING[: chance.choice((0, 5, 12))] + own
    params = Params(max_tokens=chance.choice((1, 2, 6, 9)), temperature=chance.choice((0.0, 1.0)), seed=seed)
    return Request(tuple(prompt), params, priority)


@cache
def expected(stack: DecoderStack, seed: int) -> list[int]:
    asked = request(seed)
    return drawn(stack, asked.prompt, asked.params)


class Books:
    """An engine, and what its events have said so far."""

    def __init__(self, setting: int) -> None:
        self.stack = STACKS[setting]
        self.engine = Engine(self.stack, **ENGINES[setting])  # type: ignore[arg-type]
        self.seeds: dict[str, int] = {}
        self.tokens: dict[str, list[int]] = {}
        self.cancelled: set[str] = set()

    def add(self, seed: int, priority: int = 0) -> None:
        asked = request(seed, priority)
        self.engine.add(asked)
        self.seeds[asked.id], self.tokens[asked.id] = seed, []

    def cancel(self, index: int) -> None:
        if self.seeds:
            id = list(self.seeds)[index % len(self.seeds)]
            self.engine.cancel(id)
            self.cancelled.add(id)

    def step(self) -> None:
        for event in self.engine.step():
            self._note(event)
        self.engine.check_integrity()

    def drain(self) -> None:
        for _ in range(10_000):
            if not self.engine.busy:
                break
            self.step()
        assert not self.seeds, "a request never ended"
        if self.engine.caches.tree is not None:
            self.engine.caches.tree.clear()
        assert all(pool.free == pool.count for pool in self.engine.caches.pools), "blocks have leaked"
        assert not self.engine.runner.frontiers

    def _note(self, event: Event) -> None:
        tokens, seed = self.tokens[event.id], self.seeds[event.id]
        tokens += event.tokens
        assert tokens == expected(self.stack, seed)[: len(tokens)]
        if event.finish is not None:
            assert event.finish == "length" or event.id in self.cancelled
            assert event.finish == "cancelled" or tokens == expected(self.stack, seed)
            del self.seeds[event.id], self.tokens[event.id]


class Machine(RuleBasedStateMachine):
    """Adds, cancels and steps in any order; `sent` counts the requests of all runs."""

    sent = 0

    @initialize(setting=st.integers(0, len(ENGINES) - 1))
    def begin(self, setting: int) -> None:
        self.books = Books(setting)

    @rule(seeds=st.lists(st.integers(0, 60), min_size=1, max_size=6), priority=st.integers(-1, 1))
    def add(self, seeds: list[int], priority: int) -> None:
        Machine.sent += len(seeds)
        for seed in seeds:
            self.books.add(seed, priority)

    @rule(index=st.integers(0, 20))
    def cancel(self, index: int) -> None:
        self.books.cancel(index)

    @rule(count=st.integers(1, 4))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.books.step()

    @invariant()
    def integrity(self) -> None:
        if hasattr(self, "books"):
            self.books.engine.check_integrity()

    def teardown(self) -> None:
        if hasattr(self, "books"):
            self.books.drain()


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=30, stateful_step_count=25, deadline=None, derandomize=True,
                                suppress_health_check=list(HealthCheck))


@pytest.mark.slow
def test_two_thousand_requests_leave_nothing_behind() -> None:
    before, Machine.sent = Machine.sent, 0
    run_state_machine_as_test(Machine, settings=settings(  # type: ignore[no-untyped-call]
        max_examples=16, stateful_step_count=200, deadline=None, derandomize=True, database=None,
        phases=[Phase.generate], suppress_health_check=list(HealthCheck)))
    assert Machine.sent >= 2000
    Machine.sent += before
