"""Running a system by its id: what is refused, and what the contract kit catches."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from layerwise.errors import BadOption, UnknownName
from layerwise.systems.base import Check, reproduce
from layerwise.testing import check_system

GOOD = Check(name="a", claim="one is less than two", measured=1, control={"two": 2}, holds=True, why="counted")
Fake = Callable[..., list[tuple[str, int]]]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    """Put checks in the place of a system; returns the calls it gets."""

    def put(*checks: Check) -> list[tuple[str, int]]:
        calls: list[tuple[str, int]] = []

        def run(size: str, seed: int) -> list[Check]:
            calls.append((size, seed))
            return list(checks)

        module = importlib.import_module("layerwise.systems.measure.effective_depth")
        monkeypatch.setattr(module, "run", run)
        return calls

    return put


def test_a_system_gets_its_size_and_seed(fake: Fake) -> None:
    calls = fake(GOOD)
    assert reproduce("effective-depth", "full", 3) == [GOOD]
    assert calls == [("full", 3)]


def test_an_unknown_id_says_what_is_near() -> None:
    with pytest.raises(UnknownName, match="effective-depth"):
        reproduce("effectiv-depth")


def test_a_planned_system_says_which_are_done() -> None:
    with pytest.raises(BadOption, match=r"planned but not done[\s\S]*layerwise-quant"):
        reproduce("laptop-diff")


def test_an_unknown_size_is_refused_before_anything_runs(fake: Fake) -> None:
    calls = fake(GOOD)
    with pytest.raises(BadOption, match="quick"):
        reproduce("effective-depth", "huge")  # type: ignore[arg-type]
    assert calls == []


def test_a_check_is_plain_values() -> None:
    rest = {"measured": 1, "control": {"two": 2}, "holds": True, "why": "counted"}
    assert GOOD.to_json() == {"name": "a", "claim": "one is less than two", **rest}


@pytest.mark.parametrize("holds", [True, False, None])
def test_the_contract_is_about_form_and_not_about_verdicts(fake: Fake, holds: bool | None) -> None:
    check = replace(GOOD, holds=holds)
    fake(check)
    assert check_system("effective-depth") == [check]


def test_a_claim_without_a_verdict_needs_no_control(fake: Fake) -> None:
    fake(replace(GOOD, control=None, holds=None))
    check_system("effective-depth")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"claim": ""}, "needs a claim"),
        ({"why": ""}, "a reason"),
        ({"holds": "yes"}, "must hold"),
        ({"control": None}, "no control"),
    ],
)
def test_the_contract_catches_what_is_missing(fake: Fake, change: dict[str, Any], message: str) -> None:
    fake(replace(GOOD, **change))
    with pytest.raises(AssertionError, match=message):
        check_system("effective-depth")


def test_the_contract_wants_plain_finite_values(fake: Fake) -> None:
    fake(replace(GOOD, measured=math.nan))
    with pytest.raises(ValueError, match="JSON"):
        check_system("effective-depth")
    fake(replace(GOOD, measured={1, 2}))
    with pytest.raises(TypeError):
        check_system("effective-depth")


def test_the_contract_wants_checks_with_names_of_their_own(fake: Fake) -> None:
    fake()
    with pytest.raises(AssertionError, match="checks nothing"):
        check_system("effective-depth")
    fake(GOOD, GOOD)
    with pytest.raises(AssertionError, match="repeats"):
        check_system("effective-depth")
