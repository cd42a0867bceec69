"""All systems of the measure family at quick size: `python -m benchmarks.quick [ID ...] [--output FILE]`.

Two processes of one thread each take the systems one after another, longest first, as tests do on two cores.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from benchmarks.common import Row, machine, table

MINUTES = 6.0
LONGEST_FIRST = (
    "depth-efficiency", "effective-depth", "popvqa", "internal-consistency", "layer-criticality", "rema",
    "localization-editing", "lsa", "gpu-utilization", "dst", "gender-neurons", "timetic", "layer-rotation",
    "utilized-rank", "probex", "full-cycle-energy", "torchntk", "cross-modal-flow",
)


def seconds(system: str) -> tuple[str, float, float]:
    """The system with processor and clock seconds of one quick run."""
    import torch

    from layerwise.systems.base import reproduce

    torch.set_num_threads(1)
    cpu, clock = time.process_time(), time.perf_counter()
    reproduce(system, "quick")
    return system, time.process_time() - cpu, time.perf_counter() - clock


def run(systems: Sequence[str], processes: int = 2) -> tuple[list[tuple[str, float, float]], float]:
    """Processor and clock seconds of each, and the clock seconds of all together."""
    os.environ["OMP_NUM_THREADS"] = "1"
    start = time.perf_counter()
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        found = []
        for item in pool.map(seconds, systems, chunksize=1):
            print(f"{item[0]:22} {item[1]:6.1f} s of processor {item[2]:6.1f} s by the clock", flush=True)
            found.append(item)
    return found, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("systems", nargs="*", metavar="ID", help="those to run; none means all")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--output", type=Path, help="also write the table to this Markdown file")
    arguments = parser.parse_args()
    found, clock = run(arguments.systems or LONGEST_FIRST, arguments.processes)
    total = sum(cpu for _, cpu, _ in found)
    bound = Row(f"{len(found)} systems at quick size, {arguments.processes} processes", f"{clock:.0f} s",
                clock / (60 * MINUTES), 1.0, "less", f"{total / 2:.0f} s, half of the processor time")
    lines = ["| system | processor, s | clock, s |", "|---|---|---|"]
    lines += [f"| {system} | {cpu:.1f} | {wall:.1f} |" for system, cpu, wall in found]
    text = "\n\n".join(["# The measure family at quick size", f"Command: `python -m benchmarks.quick`. Date: "
                        f"{time.strftime('%Y-%m-%d')}.", f"Machine: {machine()}.", table([bound]), "\n".join(lines)])
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
