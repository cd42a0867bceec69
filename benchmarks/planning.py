"""Time and memory of a whole plan for SmolLM2, step by step: `python -m benchmarks.planning [SHARE]`.

A process of its own does what `layerwise optimize smollm2 --bytes 30%` does. What counts as the plan is everything up
to `plan.json`: statistics, choices, solving, and measuring whole plans. Carrying it out and verifying come after.
Memory is the largest resident size of that process, Python and torch included.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from typing import Any

from benchmarks.common import Row, machine, table

ROOM, MINUTES = 1e9, 6

WORK = """
import json, sys, time
from layerwise.allocate.budget import Budget
from layerwise.report.optimize import optimize
from layerwise.report.probe import peak_memory
from layerwise.report.run import Run
began, said = time.monotonic(), []
def tell(text):
    said.append([round(time.monotonic() - began, 1), round(time.process_time(), 1), peak_memory(), text])
    print(*said[-1], file=sys.stderr, flush=True)
with Run.open(sys.argv[2], "optimize", {}) as run:
    done = optimize("smollm2", Budget(bytes=sys.argv[1]), run, tell=tell, progress=False)
    tell("finished")
    report = done.report
    print(json.dumps({"said": said, "steps": run.finished, "peak": peak_memory(), "kl": report.kl.value,
                      "weights": report.before.bytes, "after": report.after.bytes}))
"""
PLAN = ("scores", "tried", "plan")


def rows(found: dict[str, Any]) -> list[Row]:
    """Seconds until the plan is there against six minutes, and the peak against the weights and 1 GB."""
    steps: dict[str, float] = found["steps"]
    opening = next(said[0] for said in found["said"] if said[-1].startswith("trying"))
    plan = opening + sum(steps[name] for name in PLAN)
    return [Row("a whole plan: statistics, choices, solving, measuring", f"{plan:.0f} s", plan / (60 * MINUTES), 1.0,
                "less"),
            Row("peak memory of the whole flow",
                f"{found['peak'] / 1e6:.0f} MB; weights {found['weights'] / 1e6:.0f} MB",
                found["peak"] / (found["weights"] + ROOM), 1.0, "less")]


def main(share: str = "30%") -> None:
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-c", WORK, share, scratch]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    print(machine())
    print(table(rows(found)))
    print("\n| step | seconds |\n|---|---|")
    for name, seconds in found["steps"].items():
        print(f"| {name} | {seconds:.1f} |")
    print("\n| after seconds | of all cores | peak, MB | what begins |\n|---|---|---|---|")
    for second, busy, peak, text in found["said"]:
        print(f"| {second:.0f} | {busy:.0f} | {peak / 1e6:.0f} | {text} |")
    print(f"\n{found['after'] / 1e6:.1f} MB, KL {found['kl']:.4f} nats per token on text that had no part in it.")


if __name__ == "__main__":
    main(*sys.argv[1:])
