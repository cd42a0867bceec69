"""What 8-bit and 4-bit caches cost in quality: `python -m benchmarks.cache_precision [MODEL] [--blocks N]`.

Every token attends to keys and values that went through the cache's codes, in one plain pass: what the engine computes
(`tests/serve/test_engine.py` compares the two). Keys and values are computed in float32, so that only the codes differ;
the first row says what computing in bfloat16 costs by itself. KL is in nats a token, to the float32 model; the interval
is of the perplexity's ratio, by blocks.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable

import torch

import layerwise as lw
from benchmarks.common import machine
from layerwise.allocate.plan import Edit, Plan
from layerwise.data.bootstrap import paired_ratio_interval
from layerwise.data.metrics import token_kl, token_losses
from layerwise.data.text import TextData, text_blocks
from layerwise.spec import Precision
from layerwise.stack.decoder import DecoderStack


def coded(stack: DecoderStack, precision: Precision, layers: Iterable[int]) -> DecoderStack:
    """The stack with caches of `precision` in some layers."""
    edits = [Edit(layer, "cache-precision", {"precision": precision}) for layer in layers]
    return lw.apply(stack, Plan(stack.spec.fingerprint(), len(stack), tuple(edits)))


@torch.inference_mode()
def measure(name: str, data: TextData, exact: DecoderStack) -> list[str]:
    """Rows of the table."""
    half = lw.open(name, dtype="bfloat16")
    assert isinstance(half, DecoderStack)
    depth = len(exact)
    everywhere, first, last = range(depth), range(depth // 2), range(depth // 2, depth)
    cases: dict[str, tuple[DecoderStack, Precision, range]] = {
        "bfloat16, as computed": (half, "model", everywhere), "int8": (exact, "int8", everywhere),
        "int4": (exact, "int4", everywhere), "int4 in the first half of the layers": (exact, "int4", first),
        "int4 in the last half": (exact, "int4", last)}
    stacks = {what: coded(*case) for what, case in cases.items()}
    kl: dict[str, float] = dict.fromkeys(cases, 0.0)
    losses: dict[str, list[float]] = {what: [] for what in ("exact", *kl)}
    for batch in data.batches(1):
        reference_BTV = exact(batch.tokens_BT).float()
        losses["exact"].append(float(token_losses(reference_BTV, batch.tokens_BT).mean()))
        for what, stack in stacks.items():
            found_BTV = stack(batch.tokens_BT).float()
            kl[what] += float(token_kl(reference_BTV, found_BTV).mean()) / len(data)
            losses[what].append(float(token_losses(found_BTV, batch.tokens_BT).mean()))
    before = torch.tensor(losses["exact"])
    lines = ["| cache | bytes a token | KL | perplexity | change | 95 % |", "|---|---|---|---|---|---|",
             f"| float32 (reference) | {exact.spec.cache_bytes():.0f} | 0 | {before.mean().exp():.3f} | | |"]
    for what, (_, *case) in cases.items():
        after = torch.tensor(losses[what])
        once = [1.0] * len(before)
        both = paired_ratio_interval((before.tolist(), once), (after.tolist(), once))
        change, low, high = (100 * (math.exp(value) - 1) for value in (both.value, both.low, both.high))
        size = coded(half, *case).spec.cache_bytes()
        lines.append(f"| {what} | {size:.0f} | {kl[what]:.5f} | {after.mean().exp():.3f} | {change:+.2f} % | "
                     f"{low:+.2f} to {high:+.2f} % |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--blocks", type=int, default=16)
    given = parser.parse_args()
    stack = lw.open(given.model, dtype="float32")
    assert isinstance(stack, DecoderStack) and stack.tokenizer is not None
    data = text_blocks("default", stack.tokenizer, blocks=given.blocks, split="verification")
    print(f"{machine()}; {given.model}, {given.blocks} blocks of {data.length} tokens\n")
    print("\n".join(measure(given.model, data, stack)))


if __name__ == "__main__":
    main()
