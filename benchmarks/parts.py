"""Where the time of serving goes: `python -m benchmarks.parts [--repeats 3]`.

The jobs `offline` and `prefixes` of `benchmarks.serve`, with every pass through the blocks and through the head timed.
After each job the products with the matrices of the blocks are made once more for as many rows as each of its
passes had, and nothing else: what blocks took beyond that is attention, norms, activations and sums. The last block
makes keys and values only of tokens whose logits nobody reads.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

import layerwise as lw
from benchmarks.common import machine, peak
from benchmarks.serve import WRITTEN, Prompts
from layerwise.nets.decoder import Decoder
from layerwise.nets.wide import HalfLinear
from layerwise.serve import plan
from layerwise.serve.engine import Engine
from layerwise.serve.request import Params
from layerwise.stack.decoder import DecoderStack

R = TypeVar("R")


@contextmanager
def timed(place: Any, name: str, rows_of: Callable[..., R]) -> Iterator[list[tuple[R, float]]]:
    """Rows and seconds of every call of the function of that name."""
    found: list[tuple[R, float]] = []
    original = getattr(place, name)

    def instead(*given: Any) -> Any:
        began = time.perf_counter()
        result = original(*given)
        found.append((rows_of(*given), time.perf_counter() - began))
        return result

    setattr(place, name, instead)
    try:
        yield found
    finally:
        setattr(place, name, original)


class Bench:
    """The engine with SmolLM2 in bfloat16, and prompts for it."""

    def __init__(self) -> None:
        stack = lw.open("smollm2")
        assert isinstance(stack, DecoderStack)
        self.engine, self.prompts = Engine(stack), Prompts(stack.spec.vocabulary)
        blocks = [self.engine.stack.block(layer) for layer in range(len(stack))]
        self.matrices: list[HalfLinear] = [part for block in blocks for part in block.modules()
                                           if isinstance(part, HalfLinear)]
        if not self.matrices:
            raise SystemExit("no compiled products on this machine: there is nothing to tell apart")
        self.last = {part for name, part in blocks[-1].named_modules()
                     if isinstance(part, HalfLinear) and name.rpartition(".")[2] not in ("q", "k", "v")}
        self.run([self.prompts.tokens(200), self.prompts.tokens(100)], 8)

    def run(self, prompts: list[list[int]], new: int) -> float:
        began = time.perf_counter()
        list(self.engine.generate(prompts, Params(max_tokens=new, stop_ids=())))
        return time.perf_counter() - began

    def rows(self, matrix: HalfLinear, tokens: int, wanted: int) -> int:
        """How many rows a matrix is multiplied with in a pass."""
        return wanted if matrix in self.last else tokens

    @torch.inference_mode()
    def products(self, passes: list[tuple[int, int]]) -> float:
        """Seconds that the products of these passes, of some tokens and of them some wanted, take by themselves."""
        inputs = {matrix.in_features for matrix in self.matrices}
        spent = 0.0
        for tokens, wanted in passes:
            given = {width: torch.randn(tokens, width, dtype=self.engine.stack.dtype) for width in inputs}
            began = time.perf_counter()
            for matrix in self.matrices:
                matrix(given[matrix.in_features][: self.rows(matrix, tokens, wanted)])
            spent += time.perf_counter() - began
        return spent


def parts(bench: Bench, prompts: list[list[int]], new: int) -> dict[str, float]:
    """Seconds of one job by what they went to, and what its products need at the speed of torch's largest ones."""
    with timed(plan, "through", lambda steps, x_NC, wanted_P=None: (
            len(x_NC), len(x_NC if wanted_P is None else wanted_P))) as passes, \
            timed(Decoder, "logits", lambda decoder, x_BTC: x_BTC.shape[1]) as heads:
        total = bench.run(prompts, new)
    blocks, sizes = sum(seconds for _, seconds in passes), [size for size, _ in passes]
    head = sum(seconds for _, seconds in heads)
    products = bench.products(sizes)
    numbers = sum(matrix.in_features * matrix.out_features * bench.rows(matrix, *size)
                  for matrix in bench.matrices for size in sizes)
    return {"all": total, "products": products, "the rest of blocks": blocks - products, "head": head,
            "outside": total - blocks - head,
            "products at peak": 2 * numbers / peak()}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--repeats", type=int, default=3)
    repeats = options.parse_args().repeats
    bench, columns = Bench(), ""
    print(f"{machine()}; {peak() / 1e12:.2f} TFLOP/s\n")
    for name, make, new in (("offline", bench.prompts.sixteen, WRITTEN), ("prefixes", bench.prompts.prefixed, 8)):
        found = [parts(bench, make(), new) for _ in range(repeats)]
        if not columns:
            columns = " | ".join(found[0])
            print(f"| seconds | {columns} |\n|{'---|' * (1 + len(found[0]))}")
        print(f"| {name} | {' | '.join(f'{statistics.median(one[part] for one in found):.2f}' for part in found[0])} |")


if __name__ == "__main__":
    main()
