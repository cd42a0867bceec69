"""Bills that add up, break-even points by hand, and rankings that turn."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from layerwise.errors import BadOption
from layerwise.measure.energy import Meter, Spent
from layerwise.measure.ledger import Ledger, break_even, carbon, ranking


class Fixed(Meter):
    """Every piece of work costs three joules."""

    name = "fixed"

    def spent(self, work: Callable[[], object]) -> Spent:
        work()
        return Spent(3.0, 1.0, modelled=False)

    def joules(self, work: Callable[[], object]) -> float:
        return 3.0


def ledger(name: str, development: float, query: float) -> Ledger:
    made = Ledger(name, query=query)
    while made.development < development:
        made.book("train", "", Fixed(), lambda: None)
    return made


def test_stages_add_up_and_results_come_back() -> None:
    made = Ledger("a", query=0.5)
    assert made.book("search", "one", Fixed(), lambda: 7) == 7
    made.book("train", "two", Fixed(), lambda: None)
    made.book("train", "three", Fixed(), lambda: None)
    assert made.stages() == {"search": 3, "train": 6, "compress": 0}
    assert made.total(10) == 9 + 5


def test_operations_are_counted_where_asked() -> None:
    made = Ledger("a")
    a = torch.ones(2, 2)
    made.book("train", "", Fixed(), lambda: a @ a, count=True)
    assert made.entries[0].operations == 16
    assert made.entries[0].moved == 48


def test_a_query_is_the_share_of_a_loop() -> None:
    calls: list[int] = []
    made = Ledger("a")
    assert made.serve(Fixed(), lambda: calls.append(1), 4, seconds=5.0, repeats=1) == 3 / (5 * 4)
    assert len(calls) == 1 + 1 + 5


def test_what_is_carried_over_is_owed() -> None:
    base = ledger("a", 6, 1)
    assert base.carried("b").development == 6
    assert base.carried("b", 0.5).development == 3
    assert math.isnan(base.carried("b").query)


def test_break_even_by_hand() -> None:
    assert break_even(ledger("a", 3, 2.0), ledger("b", 9, 0.5)) == 4
    assert break_even(ledger("a", 9, 2.0), ledger("b", 3, 0.5)) == 0
    assert break_even(ledger("a", 3, 1.0), ledger("b", 9, 1.0)) == math.inf
    assert break_even(ledger("a", 3, 1.0), ledger("b", 9, 2.0)) == math.inf


def test_the_ranking_turns_with_use() -> None:
    bills = [ledger("cheap to make", 3, 1.0), ledger("cheap to run", 300, 0.001)]
    accuracy = {"cheap to make": 0.9, "cheap to run": 0.9}
    assert ranking(bills, accuracy, 0.1, 1)[0] == "cheap to make"
    assert ranking(bills, accuracy, 0.1, 1e6)[0] == "cheap to run"


def test_carbon_is_a_multiplier() -> None:
    assert carbon(7.2e6, 400) == 800


def test_an_unknown_stage_is_refused() -> None:
    with pytest.raises(BadOption, match="search, train, compress"):
        Ledger("a").book("serve", "", Fixed(), lambda: None)
