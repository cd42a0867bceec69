"""A checkpoint larger than the memory it may use: opened and profiled layer by layer in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.common import Row
from layerwise.io.save import save
from layerwise.io.weights import expected_tensors
from layerwise.spec import Attention, FeedForward, LayerSpec, StackSpec

ALLOWED = 1.5e9
ROW = LayerSpec(Attention(heads=32, kv_heads=8, head_dim=64), FeedForward(width=8192))
SPEC = StackSpec("llama", 2048, 32000, (ROW,) * 32, tied=True, dtype="bfloat16", context=4096)
PROFILE = """
import json, sys, time
import torch, layerwise as lw
from layerwise.report.probe import peak_memory
stack = lw.open(sys.argv[1], stream=True)
tokens = torch.randint(stack.spec.vocabulary, (2, 128), generator=torch.Generator().manual_seed(0))
start = time.perf_counter()
lw.measure(stack, tokens, ["block-influence", "relative-contribution", "weight-l2"], progress=False)
peak = peak_memory()
print(json.dumps({"peak": peak, "seconds": time.perf_counter() - start}))
"""


def rows(scratch: Path) -> list[Row]:
    """Peak resident memory of profiling a folder of random weights, Python and PyTorch included."""
    folder = scratch / "large"
    if not folder.exists():
        save(folder, SPEC, _random())
    done = subprocess.run([sys.executable, "-c", PROFILE, str(folder)], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    layer = ROW.bytes(SPEC.hidden, SPEC.dtype)
    return [Row(f"profile a {SPEC.bytes() / 1e9:.1f} GB folder, streamed",
                f"{found['peak'] / 1e9:.2f} GB resident at most, {found['seconds']:.0f} s", found["peak"] / ALLOWED,
                1.0, "less", f"one layer {layer / 1e6:.0f} MB, embedding {SPEC.embedding_bytes() / 1e6:.0f} MB")]


def _random() -> Iterator[tuple[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    for name, (shape, dtype) in expected_tensors(SPEC).items():
        yield name, (torch.randn(shape, generator=generator) * shape[-1] ** -0.5).to(dtype)
