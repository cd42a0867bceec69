"""Budgets: reading amounts and resolving them against the original."""

import math
from typing import Any

import pytest

from layerwise.allocate.budget import Budget, show
from layerwise.errors import BadBudget

ORIGINAL = {"bytes": 200e6, "parameters": 100e6, "layers": 30.0, "milliseconds": 50.0, "bits": 16.0,
            "prefill": 300.0}


@pytest.mark.parametrize(("currency", "amount", "limit"), [
    ("bytes", 0.55, 110e6),
    ("bytes", "55%", 110e6),
    ("bytes", "0.55", 110e6),
    ("bytes", "2.5x", 80e6),
    ("bytes", "120MB", 120e6),
    ("bytes", "1.5 GiB", 1.5 * 2**30),
    ("bytes", 120_000_000, 120e6),
    ("parameters", "90M", 90e6),
    ("parameters", "0.09B", 90e6),
    ("layers", 22, 22),
    ("layers", "22", 22),
    ("layers", "50%", 15),
    ("milliseconds", 12.5, 12.5),
    ("milliseconds", "0.8ms", 0.8),
    ("milliseconds", "2x", 25),
    ("prefill", "1.5x", 200),
    ("prefill", "0.3s", 300),
    ("bits", 3.5, 3.5),
    ("bits", "3.5", 3.5),
    ("bits", "25%", 4),
    ("bytes", "100%", 200e6),
])
def test_amounts(currency: str, amount: Any, limit: float) -> None:
    assert Budget(**{currency: amount}).limits(ORIGINAL) == {currency: pytest.approx(limit)}


def test_several_limits_hold_together() -> None:
    assert Budget(bytes="50%", layers=20).limits(ORIGINAL) == {"bytes": 100e6, "layers": 20}


@pytest.mark.parametrize("amount", [
    0, -1, 0.0, -0.5, "", "half", "120%", "0.5x", "0x", "12 parsecs", "1e3", "-5%", "22 layers", math.nan,
    math.inf,
])
def test_unreadable_amounts(amount: Any) -> None:
    with pytest.raises(BadBudget, match="bytes"):
        Budget(bytes=amount)


def test_a_unit_belongs_to_its_currency() -> None:
    with pytest.raises(BadBudget, match="layers"):
        Budget(layers="22MB")


def test_an_empty_budget_is_refused() -> None:
    with pytest.raises(BadBudget, match="without a limit"):
        Budget()


def test_a_currency_that_was_not_measured() -> None:
    with pytest.raises(BadBudget, match="milliseconds"):
        Budget(milliseconds=5).limits({"bytes": 1.0})


def test_text() -> None:
    assert str(Budget(bytes=0.55, layers=22, bits="3.5")) == "bytes 55%, layers 22, bits 3.5"
    assert show("bytes", 147_966_508) == "147.97 MB"
    assert show("bits", 3.5) == "3.500 bits per parameter"
