"""Recording the same sites of every layer with layerwise and with nnsight, each in a process of its own.

`python -m benchmarks.capture [--output FILE]` needs nnsight; both read the same folder in bfloat16 and record
the outputs of attention, feed-forward half and layer for every block of text.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.common import Row, machine, table

BLOCKS, LENGTH, REPEATS = 4, 512, 5

SETUP = f"""
import json, sys
import torch, layerwise as lw
from benchmarks.common import interleaved
from layerwise.data import text_blocks
from layerwise.report.probe import peak_memory
stack = lw.open("smollm2")
rows = text_blocks("default", stack.tokenizer, length={LENGTH}, blocks={BLOCKS}).tokens_NT.split(1)
side = sys.argv[1]

def ours(row):
    with stack.capture("attention", "feed_forward", "output") as captured:
        stack(row)
    return list(captured.values())

if side != "ours":
    from nnsight import NNsight
    from transformers import AutoModelForCausalLM
    watched = NNsight(AutoModelForCausalLM.from_pretrained(stack.folder, dtype=torch.bfloat16).eval())

def theirs(row):
    with watched.trace(row):
        sites = list().save()
        for layer in watched.model.layers:
            sites.append(layer.self_attn.output[0])
            sites.append(layer.mlp.output)
            sites.append(layer.output)
    return sites

def every(record):
    return [record(row) for row in rows]

with torch.inference_mode():
    if side == "both":
        works = {{"ours": lambda: every(ours), "plain": lambda: every(stack), "theirs": lambda: every(theirs)}}
        found = interleaved(works, repeats={REPEATS})
    else:
        if side == "theirs":
            del stack
        kept = every(ours if side == "ours" else theirs)
        found = {{"sites": sum(map(len, kept)), "peak": peak_memory()}}
print(json.dumps(found))
"""


def rows() -> list[Row]:
    """Time and peak memory of recording, ours over theirs."""
    seconds, ours, theirs = (_run(side) for side in ("both", "ours", "theirs"))
    assert ours["sites"] == theirs["sites"], (ours, theirs)
    what = f"record {ours['sites'] // BLOCKS} sites of smollm2, {BLOCKS} x {LENGTH} tokens"
    return [
        Row(f"{what}: time", f"{seconds['ours']:.2f} s; nnsight {seconds['theirs']:.2f} s",
            seconds["ours"] / seconds["theirs"], 1.0, "less", f"{seconds['plain']:.2f} s, the plain pass"),
        Row("peak memory of the process that does",
            f"{ours['peak'] / 1e6:.0f} MB; nnsight {theirs['peak'] / 1e6:.0f} MB",
            ours["peak"] / theirs["peak"], 1.0, "less", "weights 269 MB"),
    ]


def _run(side: str) -> dict[str, float]:
    done = subprocess.run([sys.executable, "-c", SETUP, side], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, help="also write the table to this Markdown file")
    arguments = parser.parse_args()
    text = "\n\n".join([
        "# Recording activations", f"Command: `python -m benchmarks.capture`. Date: {time.strftime('%Y-%m-%d')}.",
        f"Machine: {machine()}.", table(rows())])
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
