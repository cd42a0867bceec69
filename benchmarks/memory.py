"""Peak memory of measuring everything that needs one pass: `python -m benchmarks.memory`.

A process of its own opens smollm2 and measures 16 x 512 tokens with all instruments of a default profile; what counts
is the largest resident size of the whole process, Python and torch included, against weights + 600 MB.
"""

from __future__ import annotations

import json
import subprocess
import sys

from benchmarks.common import Row, machine, table
from benchmarks.instruments import BLOCKS, LENGTH

ROOM = 600e6

WORK = f"""
import json, sys
import layerwise as lw
from layerwise.cli.profile import default_instruments
from layerwise.data import text_blocks
from layerwise.report.probe import peak_memory
stack = lw.open("smollm2")
found = {{"weights": stack.spec.bytes(), "instruments": len(default_instruments(False))}}
data = text_blocks("default", stack.tokenizer, length={LENGTH}, blocks={BLOCKS})
if sys.argv[1] == "plain":
    import torch
    with torch.inference_mode():
        for row in data.tokens_NT.split(1):
            stack(row)
else:
    lw.measure(stack, data, default_instruments(False), batch=1, progress=False)
print(json.dumps({{**found, "peak": peak_memory()}}))
"""


def rows() -> list[Row]:
    """Largest resident size while measuring, and while only running the model, for comparison."""
    measured, plain = (_run(what) for what in ("measured", "plain"))
    return [Row(f"peak memory of all {measured['instruments']:.0f} single-pass instruments, {BLOCKS} x {LENGTH} tokens",
                f"{measured['peak'] / 1e6:.0f} MB; weights {measured['weights'] / 1e6:.0f} MB",
                measured["peak"] / (measured["weights"] + ROOM), 1.0, "less",
                f"{plain['peak'] / 1e6:.0f} MB, a process that only runs the model")]


def _run(what: str) -> dict[str, float]:
    done = subprocess.run([sys.executable, "-c", WORK, what], stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    print(machine())
    print(table(rows()))
