"""Random requests and random cancellations: nothing leaks, and whoever is left gets the tokens of a plain run."""

from __future__ import annotations

import random
from functools import cache

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from layerwise.serve.drafts import Lookup
from layerwise.serve.engine import Engine, layered
from layerwise.serve.request import Event, Params, Request
from layerwise.stack.decoder import DecoderStack
from tests.serve.plain import FULL, NARROW, Kind, drawn

STACK = Kind((FULL, NARROW)).stack()
ENGINES = [
    {"cache_tokens": 96, "block": 4, "step_tokens": 20, "running": 6},
    {"cache_tokens": 64, "block": 8, "prefix_cache": False},
    {"cache_tokens": 80, "block": 4, "groups": layered(6)},
    {"cache_tokens": 96, "block": 2, "step_tokens": 12, "drafter": Lookup(most=3, shortest=1)},
]
BEGINNING = [7, 8, 9, 7, 8, 9, 1, 2, 3, 4, 5, 6]


def request(seed: int, priority: int = 0) -> Request:
    """A request that depends on a number only: short or long, alone or with a common beginning, greedy or drawn."""
    chance = random.Random(seed)
    own = [chance.randrange(97) for _ in range(chance.choice((1, 3, 9, 30)))]
    prompt = BEGINNING[: chance.choice((0, 5, 12))] + own
    params = Params(max_tokens=chance.choice((1, 2, 6, 9)), temperature=chance.choice((0.0, 1.0)), seed=seed)
    return Request(tuple(prompt), params, priority)


@cache
def expected(seed: int) -> list[int]:
    asked = request(seed)
    return drawn(STACK, asked.prompt, asked.params)


class Books:
    """An engine, and what its events have said so far."""

    def __init__(self, stack: DecoderStack, setting: int) -> None:
        self.engine = Engine(stack, **ENGINES[setting])  # type: ignore[arg-type]
        self.seeds: dict[str, int] = {}
        self.tokens: dict[str, list[int]] = {}
        self.cancelled: set[str] = set()
        self.sent = 0

    def add(self, seed: int, priority: int = 0) -> None:
        asked = request(seed, priority)
        self.engine.add(asked)
        self.seeds[asked.id], self.tokens[asked.id] = seed, []
        self.sent += 1

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
        assert tokens == expected(seed)[: len(tokens)]
        if event.finish is not None:
            assert event.finish == "length" or event.id in self.cancelled
            assert event.finish == "cancelled" or tokens == expected(seed)
            del self.seeds[event.id], self.tokens[event.id]


class Machine(RuleBasedStateMachine):
    """Adds, cancels and steps in any order."""

    @initialize(setting=st.integers(0, len(ENGINES) - 1))
    def begin(self, setting: int) -> None:
        self.books = Books(STACK, setting)

    @rule(seeds=st.lists(st.integers(0, 60), min_size=1, max_size=6), priority=st.integers(-1, 1))
    def add(self, seeds: list[int], priority: int) -> None:
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
    chance = random.Random(0)
    books = [Books(STACK, setting) for setting in range(len(ENGINES))]
    while sum(one.sent for one in books) < 2000:
        one = chance.choice(books)
        for _ in range(chance.randrange(1, 30)):
            one.add(chance.randrange(200), chance.randrange(3))
        for _ in range(chance.randrange(12)):
            one.step()
            if chance.random() < 0.5:
                one.cancel(chance.randrange(40))
    for one in books:
        one.drain()
    assert sum(len(one.cancelled) for one in books) > 100
