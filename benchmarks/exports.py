"""Exports of one plan opened by the other tools, their perplexity beside ours on the same tokens.

    python -m benchmarks.exports smollm2 build/exports [BLOCKS]

Needs llama-cpp-python and compressed-tensors. The plan mixes the formats that both can hold; blocks are of text
that nothing was fitted to.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import layerwise as lw
from benchmarks.common import machine
from layerwise.allocate.plan import Edit
from layerwise.data.text import text_blocks
from layerwise.export.base import NOTHING
from layerwise.export.compressed_tensors import CompressedTensors
from layerwise.export.gguf import GGUF
from layerwise.export.source import Source
from layerwise.stack.decoder import DecoderStack

BLOCKS, LENGTH = 16, 512
Logits = Callable[[Tensor], Tensor]


def mixed(stack: DecoderStack, symmetric: bool) -> DecoderStack:
    """8, 5 and 4 bits in turn over the layers; with `symmetric`, without zero points and with a dense table."""
    edits = []
    for layer in range(len(stack)):
        bits = (8, 5, 4)[layer % 3]
        more = {"symmetric": True, "group": 32} if symmetric and bits < 8 else {}
        edits.append(Edit(layer, "quantize", {"bits": bits, "method": "search", **more}))
    if not symmetric:
        edits.append(Edit("embedding", "quantize", {"bits": 8, "method": "search"}))
    plan = lw.Plan(stack.spec.fingerprint(), len(stack), tuple(edits))
    slim = lw.apply(stack, plan)
    assert isinstance(slim, DecoderStack)
    return slim


def by_llamacpp(path: Path) -> Logits:
    """llama.cpp as llama-cpp-python runs it, caches in float32.

    Every pass has a thread of its own: llama.cpp sets the matrix unit (AMX) up once a thread, and torch leaves it in
    another state in between.
    """
    import llama_cpp

    model = llama_cpp.Llama(str(path), n_ctx=LENGTH, n_batch=LENGTH, logits_all=True, verbose=False, type_k=0,
                            type_v=0, n_threads=1, n_threads_batch=1)

    def logits(tokens_T: Tensor) -> Tensor:
        model.reset()
        with ThreadPoolExecutor(1) as alone:
            alone.submit(model.eval, tokens_T.tolist()).result()
        return torch.tensor(model.scores[: len(tokens_T)])

    return logits


def by_transformers(folder: Path) -> Logits:
    """transformers with the compressed-tensors package."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    return lambda tokens_T: model(tokens_T[None]).logits[0].float()


def by_us(stack: DecoderStack) -> Logits:
    return lambda tokens_T: stack(tokens_T[None])[0].float()


@torch.inference_mode()
def compare(ours: Logits, theirs: Logits, blocks: Iterable[Tensor]) -> tuple[float, float, float]:
    """Perplexity of both and the mean divergence of theirs from ours, in nats."""
    losses, divergence, count = [0.0, 0.0], 0.0, 0
    for tokens_T in blocks:
        parts = [F.log_softmax(logits(tokens_T)[:-1], -1) for logits in (ours, theirs)]
        for index, part in enumerate(parts):
            losses[index] += float(F.nll_loss(part, tokens_T[1:], reduction="sum"))
        divergence += float(F.kl_div(parts[1], parts[0], log_target=True, reduction="sum"))
        count += len(tokens_T) - 1
    return math.exp(losses[0] / count), math.exp(losses[1] / count), divergence / count


def main(name: str, folder: str, count: str = str(BLOCKS)) -> None:
    stack, place = lw.open(name), Path(folder)
    assert isinstance(stack, DecoderStack) and stack.tokenizer is not None
    data = text_blocks("default", stack.tokenizer, length=LENGTH, blocks=int(count), split="verification")
    print(machine())
    print(f"{len(data)} blocks of {data.length} tokens of {data.source.where}, {data.source.split}")
    print("| model | written as | opened by | perplexity here | there | mean KL |\n|---|---|---|---|---|---|")
    for what, model, kind in (("as it is", stack, "gguf"), ("8, 5, 4 bits", mixed(stack, False), "gguf"),
                              ("8, 5, 4 bits symmetric", mixed(stack, True), "gguf"),
                              ("8, 5, 4 bits symmetric", mixed(stack, True), "compressed-tensors")):
        path = place / f"{name}-{what.replace(', ', '-').replace(' ', '-')}.{kind}"
        (GGUF() if kind == "gguf" else CompressedTensors()).write(Source(model), path, NOTHING)
        there = by_llamacpp(path) if kind == "gguf" else by_transformers(path)
        ours, theirs, apart = compare(by_us(model), there, data.tokens_NT)
        tool = "llama.cpp" if kind == "gguf" else "transformers"
        print(f"| {name}, {what} | {kind} | {tool} | {ours:.4f} | {theirs:.4f} | {apart:.5f} |", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
