"""The whole table in one run: `python -m benchmarks.spine [--output FILE]`.

Runs `layerwise optimize smollm2 --bytes 55%` in a scratch folder first, so that quality and decoding are
those of a model the command itself made.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import decoder, instruments, memory, startup, streaming
from benchmarks.common import Row, bandwidth, machine, peak, table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, help="also write the table to this Markdown file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        text = _page(Path(scratch))
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n", encoding="utf-8")


def _page(scratch: Path) -> str:
    optimized, found = _optimize(scratch / "run")
    low, high = found["after"]["perplexity_interval"]
    rows = [*optimized, *decoder.rows(scratch / "run" / "model"), *instruments.rows(), *memory.rows(), *startup.rows(),
            *streaming.rows(scratch)]
    return "\n\n".join([
        "# Speed and memory of the spine", f"Command: `python -m benchmarks.spine`. Date: {time.strftime('%Y-%m-%d')}.",
        f"Machine: {machine()}; {bandwidth() / 1e9:.0f} GB/s of memory, {peak() / 1e12:.2f} TFLOP/s in bfloat16.",
        table(rows),
        f"The optimized model: perplexity {found['before']['perplexity']:.3f} before, "
        f"{found['after']['perplexity']:.3f} after (interval [{low:.3f}, {high:.3f}]), peak memory "
        f"{found['before']['peak_memory_bytes'] / 1e6:.0f} MB before, {found['after']['peak_memory_bytes'] / 1e6:.0f} "
        "MB after, each in a process of its own."])


def _optimize(run: Path) -> tuple[list[Row], dict[str, dict[str, Any]]]:
    start = time.perf_counter()
    command = [sys.executable, "-m", "layerwise", "optimize", "smollm2", "--bytes", "55%", "-o", str(run), "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    seconds = time.perf_counter() - start
    found = json.loads(done.stdout.splitlines()[-1])
    before, after = found["before"], found["after"]
    growth = after["perplexity"] / before["perplexity"]
    return [
        Row("`optimize smollm2 --bytes 55%`, downloads done", f"{seconds:.0f} s", seconds / 480, 1.0, "less", ""),
        Row("its stored bytes", f"{after['bytes'] / 1e6:.1f} of {before['bytes'] / 1e6:.1f} MB",
            after["bytes"] / before["bytes"], 0.55, "less", ""),
        Row("its perplexity", f"{after['perplexity']:.3f}; original {before['perplexity']:.3f}", growth, 1.01, "less",
            "1"),
    ], found


if __name__ == "__main__":
    main()
