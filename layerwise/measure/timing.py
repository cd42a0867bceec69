"""How long something takes: warmed up, waited for, the median of several runs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch

K = TypeVar("K")
Work = Callable[[], object]
FLUSH_BYTES = 2**26


def waiting(work: Work, device: torch.device) -> Work:
    """`work`, after which an accelerator is waited for."""
    if device.type != "cuda":
        return work

    def run() -> None:
        work()
        torch.cuda.synchronize(device)

    return run


def median_seconds(work: Work, repeats: int, device: torch.device | None = None, *, cold: bool = False) -> float:
    """Median seconds of `repeats` runs after a warm-up.

    `cold` writes over the processor's caches before each run, so that weights come from memory, as they do in
    a whole model.
    """
    run = waiting(work, device or torch.device("cpu"))
    return interleaved({"": run}, repeats, before=_flush if cold else None)[""]


def interleaved(candidates: Mapping[K, Work], repeats: int = 3, warmup: int = 1, *, before: Work | None = None,
                clock: Callable[[], float] = time.perf_counter) -> dict[K, float]:
    """Median seconds of each candidate; they take turns, so that a busy moment hits all of them alike.

    `before` runs outside the time before every run.
    """
    times: dict[K, list[float]] = {name: [] for name in candidates}
    for turn in range(warmup + repeats):
        for name, work in candidates.items():
            if before:
                before()
            start = clock()
            work()
            if turn >= warmup:
                times[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def busy_clock() -> Callable[[], float]:
    """The clock that other processes disturb least: this process's own time where it computes on one thread."""
    return time.process_time if torch.get_num_threads() == 1 else time.perf_counter


def _flush() -> None:
    torch.ones(FLUSH_BYTES // 4).add_(1)
