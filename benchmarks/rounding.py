"""The joint plan beside one width for every matrix, rounded by GPTQ and by AutoRound, at equal bytes.

    python -m benchmarks.rounding smollm2 build/pareto/smollm2 [--autoround FOLDER]

The folder is that of `benchmarks.pareto`, whose measurements of layers are used again. AutoRound's models are made by
`benchmarks.peers.autoround` as FOLDER/BITS-GROUP; without them only GPTQ is compared. All three store the token table
in 8 bits with a scale a row, and the joint plan has as many bytes as the other two.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import layerwise as lw
from benchmarks.common import machine
from benchmarks.pareto import Bench, kl_of, rise
from layerwise.allocate.apply import apply
from layerwise.allocate.budget import Budget
from layerwise.allocate.plan import Edit, Plan
from layerwise.io import atomic
from layerwise.spec import StackSpec
from layerwise.stack.decoder import DecoderStack

MUST = 0.8
TABLE = Edit("embedding", "quantize", {"bits": 8, "group": 0, "symmetric": True})


def uniform(spec: StackSpec, bits: int, group: int) -> Plan:
    """Every matrix in one format, by GPTQ."""
    one = {"bits": bits, "group": group, "symmetric": False, "method": "gptq"}
    layers = len(spec.rows)
    return Plan(spec.fingerprint(), layers, (*(Edit(layer, "quantize", one) for layer in range(layers)), TABLE))


def autorounded(bench: Bench, folder: Path) -> DecoderStack:
    """What AutoRound left as dense numbers, its table packed like the others'."""
    stack = lw.open(folder)
    assert isinstance(stack, DecoderStack)
    stack.tokenizer = bench.stack.tokenizer
    return apply(stack, Plan(stack.spec.fingerprint(), len(stack), (TABLE,)), bench.calibration)


def measure(bench: Bench, widths: Sequence[int], group: int, autoround: Path | None) -> None:
    for bits in widths:
        plan, name = uniform(bench.stack.spec, bits, group), f"{bits}/{group}"
        size = plan.edited(bench.stack.spec).bytes()
        bench.point(f"{name} GPTQ", lambda plan=plan: bench.carried_out(plan))
        if autoround is not None and (folder := autoround / f"{bits}-{group}").is_dir():
            bench.point(f"{name} AutoRound", lambda size=size, folder=folder: (size, autorounded(bench, folder)))
        bench.point(f"{name} joint", lambda size=size: bench.joint(Budget(bytes=size)))


def report(bench: Bench, model: str, widths: Sequence[int], group: int) -> str:
    """Everything measured so far, as Markdown."""
    lines = [f"# The joint plan beside one width on {model}", "", f"`python -m benchmarks.rounding {model} FOLDER "
             f"--group {group} --autoround FOLDER`, {machine()}; {len(bench.text)} blocks of {bench.text.length} "
             "tokens that no method has seen. Perplexity increase over the original, 95 % intervals over blocks.", "",
             "| format | MB | method | increase | joint / this | must | met | KL |", f"|{'---|' * 8}"]
    for name in (f"{bits}/{group}" for bits in widths):
        joint = bench.points.get(f"{name} joint")
        for method in ("GPTQ", "AutoRound", "joint"):
            if (point := bench.points.get(f"{name} {method}")) is None:
                continue
            value, said = rise(point)
            judged = "| | |"
            if joint is not None and method != "joint":
                ratio = rise(joint)[0] / value
                judged = f"{ratio:.2f} | <= {MUST} | {'yes' if ratio <= MUST and value > 0 else 'no'}"
            lines.append(f"| {name} | {point['bytes'] / 1e6:.1f} | {method} | {said} | {judged} | {kl_of(point):.4f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--autoround", type=Path)
    parser.add_argument("--bits", default="4,3")
    parser.add_argument("--group", type=int, default=64)
    given = parser.parse_args()
    bench, widths = Bench(given.model, given.folder), [int(bits) for bits in given.bits.split(",")]
    measure(bench, widths, given.group, given.autoround)
    page = report(bench, given.model, widths, given.group)
    atomic.write_text(given.folder / "rounding.md", page)
    print(page)


if __name__ == "__main__":
    main()
