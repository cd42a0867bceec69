"""llama.cpp opens the files and computes what we compute; its quantizer follows the rules."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from layerwise.allocate.plan import Edit, Plan
from layerwise.export.base import Allowed
from layerwise.export.gguf import GGUF
from layerwise.export.llamacpp_rules import LlamaCppRules
from layerwise.export.source import Source
from layerwise.io.gguf import GGUFFile
from layerwise.nets.decoder import Decoder
from layerwise.spec import Attention, FeedForward, LayerSpec, Norm, Rope, StackSpec
from layerwise.stack.decoder import DecoderStack
from layerwise.transform.quantize import Quantize

QUANTIZER = os.environ.get("LLAMA_QUANTIZE") or shutil.which("llama-quantize")
TOKENS = list(range(3, 35))
ROW = LayerSpec(Attention(4, 2, 32), FeedForward(192))


def filled(spec: StackSpec) -> DecoderStack:
    decoder = Decoder(spec)
    generator = torch.Generator().manual_seed(0)
    for parameter in decoder.parameters():
        spread = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.1
        one = 0.0 if parameter.dim() > 1 or spec.family == "gemma3_text" else 1.0
        parameter.data = one + spread * torch.randn(parameter.shape, generator=generator)
    return DecoderStack(decoder.requires_grad_(False).eval(), name=spec.family)


def llama(*rows: LayerSpec) -> StackSpec:
    return StackSpec("llama", 128, 97, rows or (ROW,) * 3, dtype="float32")


def gemma(layers: int) -> StackSpec:
    norm = Norm(eps=1e-6, offset=1.0)
    rows = []
    for layer in range(layers):
        slides = bool((layer + 1) % 6)
        mixer = Attention(4, 2, 32, window=8 if slides else None, qk_norm=True, scale=32**-0.5,
                          rope=Rope(10_000.0 if slides else 1_000_000.0))
        rows.append(LayerSpec(mixer, FeedForward(192, activation="gelu_tanh"), norm, post_norm=True))
    return StackSpec("gemma3_text", 128, 97, tuple(rows), dtype="float32", embedding_scale=128**0.5, final_norm=norm)


def without(layer: int, spec: StackSpec) -> StackSpec:
    return spec.with_rows({layer: None})


def biased(family: str, **more: Any) -> StackSpec:
    return dataclasses.replace(llama(dataclasses.replace(ROW, mixer=Attention(4, 2, 32, **more))), family=family)


MODELS = {
    "llama": llama(),
    "llama-3-rotation": llama(dataclasses.replace(ROW, mixer=Attention(4, 2, 32, rope=Rope(5e5, "llama3", 8.0)))),
    "untied": dataclasses.replace(llama(), tied=False),
    "uneven": llama(ROW, dataclasses.replace(ROW, mixer=None), dataclasses.replace(ROW, feed_forward=None),
                    LayerSpec(Attention(2, 1, 32), FeedForward(96))),
    "qwen2": biased("qwen2", qkv_bias=True),
    "qwen3": biased("qwen3", qk_norm=True),
    "qwen3_moe": dataclasses.replace(llama(LayerSpec(
        Attention(4, 2, 32, qk_norm=True), FeedForward(64, experts=4, experts_per_token=2))), family="qwen3_moe"),
    "mixtral": dataclasses.replace(llama(LayerSpec(
        Attention(4, 2, 32), FeedForward(64, experts=4, experts_per_token=2))), family="mixtral"),
    "gemma3": gemma(7),
    "gemma3-without-a-layer": without(1, gemma(8)),
    "gpt2": StackSpec("gpt2", 128, 97, (LayerSpec(
        Attention(4, 4, 32, rope=None, qkv_bias=True, out_bias=True),
        FeedForward(192, gated=False, activation="gelu_tanh", bias=True), Norm("layer")),) * 2,
        dtype="float32", learned_positions=64, context=64, final_norm=Norm("layer")),
}


def their_logits(path: Path) -> torch.Tensor:
    """Logits of llama.cpp for TOKENS, [T, V], attention and caches in full precision."""
    llama_cpp = pytest.importorskip("llama_cpp")
    model = llama_cpp.Llama(str(path), n_ctx=64, logits_all=True, verbose=False, n_threads=1, type_k=0, type_v=0,
                            flash_attn=False)
    model.eval(TOKENS)
    found = torch.tensor(model.scores[: len(TOKENS)])
    model.close()
    return found


@pytest.mark.parametrize("name", MODELS)
def test_llamacpp_computes_the_same_logits(name: str, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    stack = filled(MODELS[name])
    GGUF().write(Source(stack), tmp_path / "model.gguf")
    torch.testing.assert_close(their_logits(tmp_path / "model.gguf"), stack(torch.tensor([TOKENS]))[0],
                               rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(("bits", "symmetric"), [(8, True), (5, False), (5, True), (4, False), (4, True), (3, False)])
def test_llamacpp_reads_packed_matrices(bits: int, symmetric: bool, tmp_path: Path) -> None:
    """It rounds activations to 8 bits for them, hence the tolerance; the model rounded otherwise is further off."""
    pytest.importorskip("llama_cpp")
    stack = filled(llama())
    edit = Quantize(bits, 32, symmetric)
    rows = [edit.edit(row, 128) for row in stack.spec.rows]
    packed = stack.rebuilt(dataclasses.replace(stack.spec, rows=tuple(rows)),
                           [edit.apply(stack.block(layer), row) for layer, row in enumerate(stack.spec.rows)])
    GGUF().write(Source(packed), tmp_path / "model.gguf", Allowed(wider=True))
    theirs, tokens = their_logits(tmp_path / "model.gguf"), torch.tensor([TOKENS])
    assert float((theirs - packed(tokens)[0]).abs().mean()) < 0.02
    if bits < 8:
        assert float((theirs - stack(tokens)[0]).abs().mean()) > 0.02


@pytest.mark.skipif(QUANTIZER is None, reason="needs llama-quantize")
def test_llama_quantize_follows_the_rules(tmp_path: Path) -> None:
    assert QUANTIZER is not None
    stack = filled(llama(*(LayerSpec(Attention(8, 4, 32), FeedForward(512)),) * 4))
    GGUF().write(Source(stack), tmp_path / "dense.gguf")
    plan = Plan(stack.spec.fingerprint(), 4, (
        Edit(0, "quantize", {"bits": 4}), Edit(1, "drop", {"part": "layer"}), Edit(3, "quantize", {"bits": 8}),
        Edit("embedding", "quantize", {"bits": 8})))
    source = Source(plan=plan, original=stack.spec, origin="dense", name="rules")
    rules = LlamaCppRules().write(source, tmp_path / "rules.txt").path.read_text().split()
    subprocess.run([QUANTIZER, *rules, tmp_path / "dense.gguf", tmp_path / "out.gguf", "Q8_0"], check=True,
                   capture_output=True)
    file = GGUFFile(tmp_path / "out.gguf")
    assert file.metadata["llama.block_count"] == 3
    kinds = [[file.type_name(f"blk.{layer}.{name}.weight") for name in ("attn_q", "attn_output", "ffn_down")]
             for layer in range(3)]
    assert kinds == [["Q4_1", "Q4_K", "Q4_K"], ["F32"] * 3, ["Q8_0"] * 3]
    assert file.type_name("token_embd.weight") == "Q8_0"
