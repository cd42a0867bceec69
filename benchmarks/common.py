"""What every benchmark shares: interleaved timing, the machine's limits, and the table."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from layerwise.measure.hardware import bandwidth as bandwidth
from layerwise.measure.hardware import peak as peak
from layerwise.measure.timing import interleaved as interleaved


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
