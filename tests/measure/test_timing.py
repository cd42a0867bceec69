"""Medians, turns, and what is left out of the time."""

from __future__ import annotations

import time

import pytest
import torch

from layerwise.measure.timing import busy_clock, interleaved, median_seconds


def test_candidates_take_turns_after_a_warm_up() -> None:
    calls: list[str] = []
    interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repeats=2)
    assert calls == ["a", "b"] * 3


def test_the_median_of_a_clock_known_by_hand() -> None:
    ticks = iter([0.0, 10.0, 11.0, 20.0, 25.0, 30.0, 32.0])
    assert interleaved({"": lambda: None}, repeats=3, clock=lambda: next(ticks)) == {"": 2.0}


def test_what_comes_before_is_not_counted() -> None:
    found = interleaved({"": lambda: None}, repeats=1, before=lambda: time.sleep(0.02))
    assert found[""] < 0.02


def test_it_measures_seconds() -> None:
    assert median_seconds(lambda: time.sleep(0.01), 3) == pytest.approx(0.01, rel=3)
    assert median_seconds(lambda: None, 1, cold=True) < 0.5


def test_the_busy_clock_is_the_process_own_on_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert busy_clock() is time.process_time
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert busy_clock() is time.perf_counter
