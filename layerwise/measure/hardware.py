"""What a machine can do at most: operations and bytes per second, and the roofline between them.

With `peak` operations and `bandwidth` bytes per second, work of F operations on B bytes takes at least
max(F / peak, B / bandwidth). Where F / B is below peak / bandwidth, memory is the limit.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from layerwise.errors import BadOption
from layerwise.measure.timing import busy_clock, interleaved, waiting
from layerwise.nets.dense import linear


@dataclass(frozen=True)
class Machine:
    """Limits of one device in one data type, measured or from its data sheet."""

    peak: float
    bandwidth: float

    def __post_init__(self) -> None:
        if not (self.peak > 0 and self.bandwidth > 0):
            raise BadOption(f"a peak of {self.peak} and a bandwidth of {self.bandwidth}",
                            expected="operations and bytes per second, both above zero",
                            do="leave them out to have them measured")

    @property
    def balance(self) -> float:
        """Operations per byte above which memory is not the limit."""
        return self.peak / self.bandwidth

    def seconds(self, operations: float, moved: float) -> float:
        """The least time for so many operations on so many bytes."""
        return max(operations / self.peak, moved / self.bandwidth)

    def utilization(self, operations: float, seconds: float) -> float:
        """Share of the peak that was reached; apart from what a driver calls utilization."""
        return operations / (seconds * self.peak)

    def attained(self, operations: float, moved: float, seconds: float) -> float:
        """Share of what the roofline allows."""
        return self.seconds(operations, moved) / seconds


def machine(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Machine:
    """The limits of a device as measured here: a large matrix product, and a sum over memory."""
    return _machine(str(device), dtype, torch.get_num_threads())


@cache
def _machine(device: str, dtype: torch.dtype, threads: int) -> Machine:
    return Machine(peak(dtype, device), bandwidth(device))


def peak(dtype: torch.dtype = torch.bfloat16, device: str = "cpu", size: int | None = None) -> float:
    """Operations per second of a square matrix product of `size` (2048 on a processor, 8192 on an accelerator).

    By the way that dense layers take: float32 where the processor cannot multiply `dtype`.
    """
    size = size or (2048 if device == "cpu" else 8192)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / _best(lambda: linear(a, b), device)


def bandwidth(device: str = "cpu", count: int = 1 << 25) -> float:
    """Bytes per second read from memory: a sum over `count` numbers of four bytes, more than a processor caches."""
    store = torch.ones(count, device=device)
    return store.numel() * 4 / _best(store.sum, device)


def _best(work: Callable[[], object], device: str) -> float:
    run = waiting(work, torch.device(device))
    clock = busy_clock()
    return min(interleaved({"": run}, 1, clock=clock)[""] for _ in range(5))


def processor() -> str:
    """The processor's name, or its architecture where the system does not say."""
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
