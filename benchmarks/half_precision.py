"""How fast dense products in bfloat16 are, by rows: `python -m benchmarks.half_precision`.

Matrices of SmolLM2's size on this CPU, more than a core's caches hold: torch's product in float32 (what the others are
held against) and in bfloat16, the bfloat16 matrix widened first (`layerwise.nets.dense.widened`), in oneDNN's layout
(`layerwise.nets.direct.PrepackedLinear`), and the compiled products that read it as it is, for rows in float32 and in
bfloat16 (`layerwise.nets.wide.HalfLinear`). From where "widened" overtakes "bfloat16" on, `layerwise.nets.dense.SLOW`
widens.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import cycle, islice

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import machine
from layerwise.nets.compiled import library
from layerwise.nets.dense import SLOW, widened
from layerwise.nets.direct import FEW_ROWS, PrepackedLinear
from layerwise.nets.wide import HalfLinear

OUTPUTS, INPUTS, MATRICES, REPEATS = 1536, 576, 60, 3
ROWS = (1, 4, 8, 16, 32, 48, 64, 128, 256, 512)


def rate(products: Sequence[Callable[[], Tensor]], rows: int) -> str:
    """Billions of operations a second: the median over `REPEATS` rounds of all matrices, after one that warms up."""
    took = []
    for product in islice(cycle(products), (1 + REPEATS) * len(products)):
        start = time.perf_counter()
        product()
        took.append(time.perf_counter() - start)
    return f"{2 * rows * OUTPUTS * INPUTS / statistics.median(took[len(products):]) / 1e9:.0f}"


@torch.inference_mode()
def main() -> None:
    weights_OI = [torch.randn(OUTPUTS, INPUTS) for _ in range(MATRICES)]
    halves_OI = [weight_OI.bfloat16() for weight_OI in weights_OI]
    laid_out = [PrepackedLinear(half_OI) for half_OI in halves_OI if PrepackedLinear.fits(half_OI)]
    found = library()
    compiled = [HalfLinear(half_OI) for half_OI in halves_OI] if found is not None else []
    pairs = compiled if found is not None and found.multiplies_pairs() else []
    print(machine())
    print(f"widened from {SLOW[torch.bfloat16]} rows on" if torch.bfloat16 in SLOW else "never widened")
    columns = ("rows", "float32", "bfloat16", "widened", "oneDNN's layout", "as it is, float32 rows", "bfloat16 rows")
    print(f"\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for rows in ROWS:
        x_NI = torch.randn(rows, INPUTS)
        half_NI = x_NI.bfloat16()
        kinds = [[partial(F.linear, x_NI, weight_OI) for weight_OI in weights_OI],
                 [partial(F.linear, half_NI, half_OI) for half_OI in halves_OI],
                 [partial(widened, half_NI, half_OI, None, torch.bfloat16) for half_OI in halves_OI],
                 [partial(layer, half_NI) for layer in laid_out],
                 [partial(layer, x_NI) for layer in compiled],
                 [partial(layer, half_NI) for layer in pairs if rows <= FEW_ROWS or torch.bfloat16 in layer.many]]
        print(f"| {rows} | {' | '.join(rate(kind, rows) if kind else '' for kind in kinds)} |", flush=True)


if __name__ == "__main__":
    main()
