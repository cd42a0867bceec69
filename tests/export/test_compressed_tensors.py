"""Folders in the compressed-tensors format, opened by transformers where the package is installed."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from layerwise.errors import BadModel, BadOption
from layerwise.export.base import Allowed
from layerwise.export.compressed_tensors import CompressedTensors
from layerwise.export.source import Source
from layerwise.io.safetensors import SafetensorsCheckpoint
from layerwise.io.source import read
from layerwise.nets.factored import weights
from layerwise.spec import Format
from layerwise.stack.decoder import DecoderStack
from layerwise.testing.stacks import random_stack
from layerwise.transform.quantize import Quantize, pack_table

TOKENS = torch.arange(12).view(2, 6)


def quantized(*edits: Quantize) -> DecoderStack:
    """A stack of bfloat16 with edit i made to layer i."""
    stack = random_stack(max(2, len(edits)), dtype="bfloat16")
    rows = {layer: edit.edit(stack.spec.rows[layer], stack.spec.hidden) for layer, edit in enumerate(edits)}
    blocks = [edits[layer].apply(stack.block(layer), stack.spec.rows[layer]) if layer < len(edits)
              else stack.block(layer) for layer in range(len(stack))]
    return stack.rebuilt(stack.spec.with_rows(rows), blocks)


SYMMETRIC = [Quantize(8), Quantize(4, 32, True), Quantize(3, 32, True), Quantize(6, 0, True), Quantize(5, 64, True)]


def test_transformers_opens_what_is_written(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM

    stack = quantized(*SYMMETRIC)
    CompressedTensors().write(Source(stack), tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    logits = model(TOKENS).logits.float()
    torch.testing.assert_close(logits, stack(TOKENS).float(), rtol=0.05, atol=0.1)
    for layer in range(len(SYMMETRIC)):
        ours = stack.block(layer).matrices()  # type: ignore[union-attr]
        theirs = model.model.layers[layer]
        assert torch.equal(theirs.mlp.up_proj.weight, weights(ours["up"], torch.bfloat16))
        assert torch.equal(theirs.self_attn.k_proj.weight, weights(ours["k"], torch.bfloat16))


def test_zero_points_are_rounded_again_where_allowed(tmp_path: Path) -> None:
    stack = quantized(Quantize(4), Quantize(8))
    with pytest.raises(BadOption, match=r"'q' of layer 0 in 4 bits with zero points.*\n.*\n.*--allow-requantize"):
        CompressedTensors().write(Source(stack), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    written = CompressedTensors().write(Source(stack), tmp_path / "out", Allowed(requantize=True))
    assert "7 rounded again without zero points" in written.notes[1]
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    _ = model(TOKENS)
    matrix = stack.block(0).matrix("up")  # type: ignore[union-attr]
    difference = (model.model.layers[0].mlp.up_proj.weight - matrix.dense(torch.bfloat16)).abs()
    assert 0 < float(difference.max()) < 1.5 * float(matrix.scale.max())


def test_the_folder_says_what_is_packed(tmp_path: Path) -> None:
    stack = quantized(Quantize(8), Quantize(4, 32, True))
    written = CompressedTensors().write(Source(stack), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    groups = config["quantization_config"]["config_groups"]
    assert [group["weights"]["num_bits"] for group in groups.values()] == [8, 4]
    assert r"re:.*layers\.(1)\.self_attn\.q_proj$" in groups["group_1"]["targets"]
    stored = SafetensorsCheckpoint(tmp_path / "out")
    assert stored.shape("model.layers.1.self_attn.q_proj.weight_packed") == (64, 64 * 4 // 32)
    assert "model.layers.0.mlp.up_proj.weight" not in stored.names()
    assert written.bytes == sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    with pytest.raises(BadModel, match="packed by compressed-tensors"):
        read(tmp_path / "out")


def test_tables_factors_and_shapes_are_refused_or_made_dense(tmp_path: Path) -> None:
    stack = quantized(Quantize(8))
    table = pack_table(stack.decoder.embedding.weight, Format(8, 0, True))  # type: ignore[arg-type]
    packed = stack.rebuilt(dataclasses.replace(stack.spec, embedding_format=table.format),
                           list(stack.decoder.layers), embedding=table)
    with pytest.raises(BadOption, match="the embedding in 8 bits"):
        CompressedTensors().write(Source(packed), tmp_path / "out")
    CompressedTensors().write(Source(packed), tmp_path / "out", Allowed(dense=True))
    found = SafetensorsCheckpoint(tmp_path / "out").tensor("model.embed_tokens.weight")
    assert torch.equal(found, table.dense(torch.bfloat16))

    narrow = dataclasses.replace(stack.spec.rows[1].feed_forward, width=96)
    uneven = Source(stack)
    uneven.__dict__["spec"] = stack.spec.with_rows({1: dataclasses.replace(stack.spec.rows[1], feed_forward=narrow)})
    with pytest.raises(BadOption, match="whose layers differ in shape"):
        CompressedTensors().write(uneven, tmp_path / "other")


def test_a_dense_model_is_the_familys_own_folder(tmp_path: Path) -> None:
    stack = random_stack(3)
    slim = stack.rebuilt(stack.spec.with_rows({1: None}), [stack.block(0), stack.block(2)])
    CompressedTensors().write(Source(slim), tmp_path / "out")
    from layerwise.stack.open import open as open_stack

    torch.testing.assert_close(open_stack(tmp_path / "out")(TOKENS), slim(TOKENS))
