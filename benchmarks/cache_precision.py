"""What 8-bit and 4-bit caches cost in quality: `python -m benchmarks.cache_precision [MODEL] [--blocks N]`.

Every token attends to keys and values that went through the cache's codes, in one plain pass: what the engine computes
(`tests/serve/test_engine.py` compares the two). Keys and values are computed in float32, so that only the codes differ;
the first row says what computing in bfloat16 costs by itself. KL is in nats a token, to the float32 model; the interval
is of the perplexity's ratio, by blocks.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Collection
from dataclasses import replace

import torch
from torch import Tensor

import layerwise as lw
from benchmarks.common import machine
from layerwise.data.bootstrap import paired_ratio_interval
from layerwise.data.metrics import token_kl, token_losses
from layerwise.data.text import TextData, text_blocks
from layerwise.nets.flow import Flow
from layerwise.serve.pool import POOLS, CodedPool
from layerwise.serve.table import Precision
from layerwise.spec import Attention
from layerwise.stack.decoder import DecoderStack


class Coded(Flow):
    """A flow whose keys and values in `coded` layers are what codes of `precision` say of them."""

    precision: Precision
    coded: Collection[int]

    def attend(self, a: Attention, layer: int, q_BHTD: Tensor, k_BKTD: Tensor | None = None,
               v_BKTD: Tensor | None = None) -> Tensor:
        if k_BKTD is not None and v_BKTD is not None and layer in self.coded:
            pool = POOLS[self.precision](1, 1, 1, a.head_dim, torch.float32, k_BKTD.device)
            assert isinstance(pool, CodedPool)
            k_BKTD, v_BKTD = (pool.decode(pool.encode(x.float())).to(x.dtype) for x in (k_BKTD, v_BKTD))
        return super().attend(a, layer, q_BHTD, k_BKTD, v_BKTD)


@torch.inference_mode()
def logits(stack: DecoderStack, tokens_BT: Tensor, precision: Precision, layers: Collection[int]) -> Tensor:
    """Predictions [B, T, V] with coded caches."""
    state = stack.start(tokens_BT)
    if precision != "model":
        flow = Coded(state.shared.positions_BT, dtype=state.shared.dtype)
        flow.precision, flow.coded = precision, layers
        state = replace(state, shared=flow)
    return stack.finish(stack.run(state)).float()


def measure(name: str, data: TextData, exact: DecoderStack) -> list[str]:
    """Rows of the table."""
    half = lw.open(name, dtype="bfloat16")
    assert isinstance(half, DecoderStack)
    depth = len(exact)
    everywhere, first, last = range(depth), range(depth // 2), range(depth // 2, depth)
    cases: list[tuple[str, DecoderStack, Precision, range]] = [
        ("bfloat16, as computed", half, "model", everywhere), ("int8", exact, "int8", everywhere),
        ("int4", exact, "int4", everywhere), ("int4 in the first half of the layers", exact, "int4", first),
        ("int4 in the last half", exact, "int4", last)]
    kl: dict[str, float] = dict.fromkeys((case[0] for case in cases), 0.0)
    losses: dict[str, list[float]] = {what: [] for what in ("exact", *kl)}
    for batch in data.batches(1):
        reference_BTV = logits(exact, batch.tokens_BT, "model", ())
        losses["exact"].append(float(token_losses(reference_BTV, batch.tokens_BT).mean()))
        for what, stack, precision, layers in cases:
            found_BTV = logits(stack, batch.tokens_BT, precision, layers)
            kl[what] += float(token_kl(reference_BTV, found_BTV).mean()) / len(data)
            losses[what].append(float(token_losses(found_BTV, batch.tokens_BT).mean()))
    before = torch.tensor(losses["exact"])
    sizes = {precision: _bytes(half, precision) for precision in POOLS}
    lines = ["| cache | bytes a token | KL | perplexity | change | 95 % |", "|---|---|---|---|---|---|",
             f"| float32 (reference) | {2 * sizes['model']} | 0 | {before.mean().exp():.3f} | | |"]
    for what, _, precision, layers in cases:
        after = torch.tensor(losses[what])
        once = [1.0] * len(before)
        both = paired_ratio_interval((before.tolist(), once), (after.tolist(), once))
        change, low, high = (100 * (math.exp(value) - 1) for value in (both.value, both.low, both.high))
        size = (sizes[precision] * len(layers) + sizes["model"] * (depth - len(layers))) // depth
        lines.append(f"| {what} | {size} | {kl[what]:.5f} | {after.mean().exp():.3f} | {change:+.2f} % | "
                     f"{low:+.2f} to {high:+.2f} % |")
    return lines


def _bytes(stack: DecoderStack, precision: Precision) -> int:
    return sum(group.token_bytes for group in lw.layer_table(stack.spec, precision=precision).groups)


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
