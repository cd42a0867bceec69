"""Counters of the system for real; those of the processor where it shows them, and how it is said where it does not."""

from __future__ import annotations

import mmap
import os
import sys
import threading
import time

import pytest

from layerwise.errors import BadOption
from layerwise.measure import cost
from layerwise.measure.counters import EVENTS, Counters, counted
from layerwise.measure.engine import measure
from layerwise.stack.decoder import DecoderStack

SIZE, HUGE_PAGE = 2**26, 2**21
HARDWARE = {"cycles", "instructions", "cache-misses"}
system_counts = pytest.mark.skipif("nanoseconds" not in counted(), reason="the system counts nothing for a process")
processor_counts = pytest.mark.skipif(not set(counted()) >= HARDWARE, reason="the processor shows no counters")


def busy(seconds: float) -> None:
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        pass


@system_counts
def test_time_on_the_processor_is_counted_and_waiting_is_not() -> None:
    with Counters(["nanoseconds"]) as working:
        before = time.process_time()
        busy(0.05)
        spent = time.process_time() - before
    with Counters(["nanoseconds"]) as waiting:
        time.sleep(0.05)
    assert 0.05e9 <= working.counts["nanoseconds"] <= 1.2 * spent * 1e9
    assert waiting.counts["nanoseconds"] < 0.02e9


@system_counts
def test_other_threads_count_too() -> None:
    go, done = threading.Event(), threading.Event()

    def work() -> None:
        go.wait()
        busy(0.05)
        done.set()

    thread = threading.Thread(target=work)
    thread.start()
    with Counters(["nanoseconds"]) as counters:
        go.set()
        done.wait()
    thread.join()
    assert counters.counts["nanoseconds"] >= 0.05e9


@system_counts
def test_every_new_page_is_a_fault() -> None:
    with Counters(["page-faults"]) as counters, mmap.mmap(-1, SIZE) as store:  # memory that nobody had before
        for place in range(0, SIZE, mmap.PAGESIZE):
            store[place] = 1
    assert counters.counts["page-faults"] >= SIZE // HUGE_PAGE


@system_counts
def test_files_are_closed_again() -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with Counters(["nanoseconds", "page-faults"]):
            pass
    assert len(os.listdir("/proc/self/fd")) == before


@processor_counts
def test_a_product_takes_instructions_and_reads_its_weights(stack: DecoderStack) -> None:
    found = measure(stack, None, "cost", progress=False)
    assert all(value > 1000 for value in found["cost:instructions"].values)
    assert all(value >= 0 for value in found["cost:memory-bytes"].values)


def test_cost_shows_only_what_is_counted(stack: DecoderStack, monkeypatch: pytest.MonkeyPatch) -> None:
    found = measure(stack, None, "cost", progress=False)
    assert ("cost:memory-bytes" in found) == ("cache-misses" in counted())
    monkeypatch.setattr(cost, "counted", lambda: ())
    assert set(measure(stack, None, "cost", progress=False).columns) == {
        "cost:parameters", "cost:bytes", "cost:flops", "cost:prefill-ms", "cost:decode-ms"}


@system_counts
def test_a_column_per_event(stack: DecoderStack, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of a hardware event, walked with one that every system counts."""
    monkeypatch.setattr(cost, "COUNTED", {"nanoseconds": ("busy", "ns", 2)})
    values = measure(stack, None, "cost", progress=False)["cost:busy"].values
    assert all(value > 0 and value % 2 == 0 for value in values)


def test_unknown_events_and_other_systems_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadOption, match="branches"):
        Counters(["branches"])
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(BadOption, match="perf_event_open"), Counters(list(EVENTS)):
        pass
