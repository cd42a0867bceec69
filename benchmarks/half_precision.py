"""How fast dense products in bfloat16 are, by rows: `python -m benchmarks.half_precision`.

One matrix of SmolLM2's size on this CPU: torch's product in float32 (what the others are held against) and in bfloat16,
the bfloat16 matrix widened first (`layerwise.nets.dense.widened`), and the compiled product that reads it as it is
(`layerwise.nets.wide.HalfLinear`). From where "widened" overtakes "bfloat16" on, `layerwise.nets.dense.SLOW` widens.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import machine
from layerwise.nets.compiled import library
from layerwise.nets.dense import SLOW, widened
from layerwise.nets.direct import FEW_ROWS
from layerwise.nets.wide import HalfLinear

OUTPUTS, INPUTS, REPEATS = 1536, 576, 40
ROWS = (1, 4, 8, 16, 32, 48, 64, 128, 256, 512)


def rate(product: Callable[[], Tensor], rows: int) -> str:
    """Billions of operations a second, the median of `REPEATS` calls."""
    took = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        product()
        took.append(time.perf_counter() - start)
    return f"{2 * rows * OUTPUTS * INPUTS / statistics.median(took) / 1e9:.0f}"


@torch.inference_mode()
def main() -> None:
    weight_OI = torch.randn(OUTPUTS, INPUTS)
    half_OI = weight_OI.bfloat16()
    compiled = HalfLinear(half_OI) if library() is not None else None
    print(machine())
    print(f"widened from {SLOW[torch.bfloat16]} rows on" if torch.bfloat16 in SLOW else "never widened")
    print("\n| rows | float32 | bfloat16 | widened | as it is, compiled |\n|---|---|---|---|---|")
    for rows in ROWS:
        x_NI = torch.randn(rows, INPUTS)
        half_NI = x_NI.bfloat16()
        found = [rate(partial(F.linear, x_NI, weight_OI), rows), rate(partial(F.linear, half_NI, half_OI), rows),
                 rate(partial(widened, half_NI, half_OI, None, torch.bfloat16), rows),
                 "" if compiled is None or rows > FEW_ROWS else rate(partial(compiled, x_NI), rows)]
        print(f"| {rows} | {' | '.join(found)} |", flush=True)


if __name__ == "__main__":
    main()
