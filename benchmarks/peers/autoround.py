"""AutoRound as a baseline: signed-gradient rounding block by block, its result as dense weights that `lw.open` reads.

    python -m benchmarks.peers.autoround smollm2 build/autoround/4-64 --bits 4 --group 64 [--recipe light]

Needs the package auto-round and transformers; run it with a Python that has them. Calibration is the same text as for
our own methods. The folder holds the rounded weights as ordinary bfloat16 numbers (what the format of `bits` and
`group` can express, de-quantised), to be charged the bytes of that format; embedding and head stay as they are.
Its authors' recipe `light` takes a quarter of the iterations of the default, in larger steps.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import layerwise as lw
from layerwise.data.text import text_blocks
from layerwise.io.demos import demo

BLOCKS, LENGTH = 104, 512
"""All that the text has; AutoRound's own default is 128 blocks of 2,048 tokens."""
RECIPES: dict[str, tuple[int, float | None]] = {"default": (200, None), "light": (50, 5e-3)}
"""Iterations a layer and learning rate (None: one over the iterations), as its own command line sets them."""


class Tokens(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Blocks of token ids in the form that AutoRound's data loader is given."""

    def __init__(self, tokens_NT: Tensor) -> None:
        self.tokens_NT = tokens_NT

    def __len__(self) -> int:
        return len(self.tokens_NT)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens_T = self.tokens_NT[index]
        return {"input_ids": tokens_T, "attention_mask": torch.ones_like(tokens_T)}


def autoround(source: str | Path, target: str | Path, tokens_NT: Tensor, *, bits: int = 4, group: int = 128,
              symmetric: bool = False, recipe: str = "default", dtype: torch.dtype = torch.bfloat16) -> Path:
    """Round the model in the folder `source` and write it, de-quantised, to the new folder `target`, which is returned.

    Computes in `dtype`. One iteration passes eight blocks forwards and backwards through a layer: 200 of them over 30
    layers of 3.5 million weights are 6,000 such passes of 4,096 tokens, some 5 * 10^14 operations.
    """
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    iterations, rate = RECIPES[recipe]
    model = AutoModelForCausalLM.from_pretrained(str(source), dtype=dtype)
    loader: Any = torch.utils.data.DataLoader(Tokens(tokens_NT), batch_size=1)
    rounding = AutoRound(model, AutoTokenizer.from_pretrained(str(source)), bits=bits, group_size=group,
                         sym=symmetric, iters=iterations, dataset=loader, nsamples=len(tokens_NT),
                         seqlen=tokens_NT.shape[1], batch_size=8, device_map="cpu", enable_torch_compile=False, seed=42,
                         lr=rate, amp=dtype is torch.bfloat16)
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=Path(target).parent) as beside:
        rounding.quantize_and_save(beside, format="fake")
        (written,) = Path(beside).rglob("model.safetensors")
        shutil.copytree(written.parent, target)
    return Path(target)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("model")
    options.add_argument("target")
    options.add_argument("--bits", type=int, default=4)
    options.add_argument("--group", type=int, default=128)
    options.add_argument("--symmetric", action="store_true")
    options.add_argument("--recipe", choices=list(RECIPES), default="default")
    options.add_argument("--float32", action="store_true", help="where the processor is slow in bfloat16")
    options.add_argument("--blocks", type=int, default=BLOCKS)
    given = options.parse_args()
    stack = lw.open(given.model)
    assert stack.tokenizer is not None
    data = text_blocks("default", stack.tokenizer, length=LENGTH, blocks=given.blocks)
    start = time.perf_counter()
    autoround(given.model if Path(given.model).is_dir() else demo(given.model), given.target, data.tokens_NT,
              bits=given.bits, group=given.group, symmetric=given.symmetric, recipe=given.recipe,
              dtype=torch.float32 if given.float32 else torch.bfloat16)
    print(f"{given.target}: {time.perf_counter() - start:.0f} s, recipe {given.recipe}, {given.blocks} blocks of "
          f"{LENGTH} tokens")


if __name__ == "__main__":
    main()
