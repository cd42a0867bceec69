"""What every benchmark shares: interleaved timing, the machine's limits, and the table."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

import torch

K = TypeVar("K")


@dataclass(frozen=True)
class Row:
    """One comparison: `ratio` against the reference, the bound it must reach, and the physical limit."""

    what: str
    measured: str
    ratio: float
    must: float
    better: str
    limit: str = ""

    @property
    def met(self) -> bool:
        return self.ratio <= self.must if self.better == "less" else self.ratio >= self.must


def interleaved(candidates: dict[K, Callable[[], object]], repeats: int = 3, warmup: int = 1) -> dict[K, float]:
    """Median seconds of each candidate; they take turns, so that a busy moment hits all of them alike."""
    times: dict[K, list[float]] = {name: [] for name in candidates}
    for turn in range(warmup + repeats):
        for name, work in candidates.items():
            start = time.perf_counter()
            work()
            if turn >= warmup:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def bandwidth() -> float:
    """Bytes per second read from memory by all cores: a sum over 512 MB."""
    store = torch.ones(1 << 27)
    return store.numel() * 4 / min(interleaved({"sum": store.sum}, repeats=5).values())


def peak(dtype: torch.dtype = torch.bfloat16) -> float:
    """Floating-point operations per second of a large matrix product."""
    a, b = (torch.randn(2048, 2048).to(dtype) for _ in range(2))
    return 2 * 2048**3 / min(interleaved({"mm": lambda: a @ b}, repeats=5).values())


def machine() -> str:
    """One line: processor, cores, versions."""
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as lines:
            name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, Python {platform.python_version()}"


def table(rows: Iterable[Row]) -> str:
    """A Markdown table of the rows."""
    lines = ["| what | measured | ratio | must | met | limit |", "|---|---|---|---|---|---|"]
    for row in rows:
        sign = "<=" if row.better == "less" else ">="
        lines.append(
            f"| {row.what} | {row.measured} | {row.ratio:.2f} | {sign} {row.must:g} | "
            f"{'yes' if row.met else 'no'} | {row.limit} |"
        )
    return "\n".join(lines)
