"""GGUF files are read back by the `gguf` package and by our own reader, value for value."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import gguf
import pytest
import torch

from layerwise.errors import BadOption
from layerwise.export.base import Allowed
from layerwise.export.gguf import GGUF
from layerwise.export.source import Source
from layerwise.nets.decoder import Decoder
from layerwise.nets.factored import weights
from layerwise.spec import Attention, FeedForward, Format, LayerSpec, Norm, Rope, StackSpec, Tiers
from layerwise.stack.decoder import DecoderStack
from layerwise.stack.open import open as open_stack
from layerwise.testing.stacks import random_stack
from layerwise.transform.quantize import Quantize, pack_table

ROW = LayerSpec(Attention(4, 2, 16), FeedForward(128))
BIASED = Attention(4, 2, 16, qkv_bias=True)
NORMED = Attention(4, 2, 16, qk_norm=True)
FAMILIES = {
    "llama": (ROW, {}),
    "qwen2": (dataclasses.replace(ROW, mixer=BIASED), {}),
    "qwen3": (dataclasses.replace(ROW, mixer=NORMED), {"tied": False}),
    "mixtral": (dataclasses.replace(ROW, feed_forward=FeedForward(64, experts=4, experts_per_token=2)), {}),
    "qwen3_moe": (LayerSpec(NORMED, FeedForward(64, experts=4, experts_per_token=2)), {}),
    "gpt2": (LayerSpec(Attention(4, 4, 16, rope=None, qkv_bias=True, out_bias=True),
                       FeedForward(128, gated=False, activation="gelu_tanh", bias=True), Norm("layer")),
             {"learned_positions": 64, "context": 64, "final_norm": Norm("layer")}),
}


def stack_of(family: str) -> DecoderStack:
    row, more = FAMILIES[family]
    spec = dataclasses.replace(StackSpec(family, 64, 97, (row,) * 3, dtype="float32"), **more)
    return filled(spec)


def gemma(layers: int = 7) -> DecoderStack:
    def mixer(layer: int) -> Attention:
        slides = bool((layer + 1) % 6)
        return Attention(4, 2, 16, window=8 if slides else None, qk_norm=True, scale=16**-0.5,
                         rope=Rope(10_000.0 if slides else 1_000_000.0))

    norm = Norm(eps=1e-6, offset=1.0)
    rows = tuple(LayerSpec(mixer(layer), FeedForward(128, activation="gelu_tanh"), norm, post_norm=True)
                 for layer in range(layers))
    return filled(StackSpec("gemma3_text", 64, 97, rows, dtype="float32", embedding_scale=8.0, final_norm=norm))


def filled(spec: StackSpec) -> DecoderStack:
    decoder = Decoder(spec)
    generator = torch.Generator().manual_seed(0)
    for parameter in decoder.parameters():
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return DecoderStack(decoder.requires_grad_(False).eval(), name=spec.family)


def quantized(stack: DecoderStack, *edits: Quantize) -> DecoderStack:
    """The stack with edit i made to layer i."""
    rows = {layer: edit.edit(stack.spec.rows[layer], stack.spec.hidden) for layer, edit in enumerate(edits)}
    blocks = [edits[layer].apply(stack.block(layer), stack.spec.rows[layer]) if layer < len(edits)
              else stack.block(layer) for layer in range(len(stack))]
    return stack.rebuilt(stack.spec.with_rows(rows), blocks)


def logits(stack: DecoderStack) -> torch.Tensor:
    return stack(torch.arange(12).view(2, 6)).float()


def stored(path: Path) -> dict[str, tuple[str, torch.Tensor]]:
    """Name to (type, values) as the `gguf` package reads them."""
    return {tensor.name: (tensor.tensor_type.name,
                          torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy()))
            for tensor in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize("family", [*FAMILIES, "gemma3_text"])
def test_a_dense_model_comes_back_the_same(family: str, tmp_path: Path) -> None:
    stack = gemma() if family == "gemma3_text" else stack_of(family)
    written = GGUF().write(Source(stack), tmp_path / "model.gguf")
    again = open_stack(written.path, dtype="float32")
    assert written.bytes == written.path.stat().st_size
    torch.testing.assert_close(logits(again), logits(stack))


@pytest.mark.parametrize(("bits", "group", "symmetric", "kind"), [
    (8, 0, True, "Q8_0"), (8, 32, True, "Q8_0"), (5, 32, False, "Q5_1"), (5, 64, True, "Q5_0"),
    (4, 32, False, "Q4_1"), (4, 64, False, "Q4_1"), (4, 32, True, "Q4_0"), (4, 0, False, "Q4_1")])
def test_codes_are_kept(bits: int, group: int, symmetric: bool, kind: str, tmp_path: Path) -> None:
    stack = quantized(stack_of("qwen2"), Quantize(bits, group, symmetric))
    GGUF().write(Source(stack), tmp_path / "model.gguf")
    found = stored(tmp_path / "model.gguf")
    for ours, theirs in {"q": "attn_q", "o": "attn_output", "gate": "ffn_gate", "down": "ffn_down"}.items():
        matrix = stack.block(0).matrix(ours)  # type: ignore[union-attr]
        type_, values = found[f"blk.0.{theirs}.weight"]
        offset = 0.0 if matrix.zero is None else float((matrix.zero.abs() + 2**bits * matrix.scale.abs()).max())
        assert type_ == kind
        torch.testing.assert_close(values, weights(matrix), rtol=1e-6, atol=offset * 2**-11)
    torch.testing.assert_close(logits(open_stack(tmp_path / "model.gguf", dtype="float32")), logits(stack),
                               rtol=1e-2, atol=1e-2)


def test_symmetric_codes_are_exact_to_the_bit(tmp_path: Path) -> None:
    stack = quantized(stack_of("llama"), Quantize(8))
    GGUF().write(Source(stack), tmp_path / "model.gguf")
    again = open_stack(tmp_path / "model.gguf", dtype="float32")
    for name, matrix in stack.block(0).matrices().items():  # type: ignore[union-attr]
        assert torch.equal(again.block(0).matrix(name).weight, weights(matrix))  # type: ignore[union-attr]


def test_table_and_experts_and_fused_matrices_are_packed(tmp_path: Path) -> None:
    for family in ("llama", "mixtral", "gpt2"):
        stack = quantized(stack_of(family), Quantize(4))
        table = pack_table(stack.decoder.embedding.weight, Format(8, 0, True))  # type: ignore[arg-type]
        stack = stack.rebuilt(dataclasses.replace(stack.spec, embedding_format=table.format),
                              list(stack.decoder.layers), embedding=table)
        GGUF().write(Source(stack), tmp_path / "model.gguf")
        kinds = {name: kind for name, (kind, _) in stored(tmp_path / "model.gguf").items()}
        assert kinds["token_embd.weight"] == "Q8_0"
        assert kinds["blk.0.attn_qkv.weight" if family == "gpt2" else "blk.0.attn_q.weight"] == "Q4_1"
        assert kinds["blk.0.ffn_up_exps.weight" if family == "mixtral" else "blk.0.ffn_up.weight"] == "Q4_1"
        torch.testing.assert_close(logits(open_stack(tmp_path / "model.gguf", dtype="float32")), logits(stack),
                                   rtol=2e-2, atol=2e-2)


def test_a_table_in_two_formats_becomes_one(tmp_path: Path) -> None:
    stack, format = stack_of("llama"), Tiers(9, Format(8, 0, True), Format(3, 32))
    table = pack_table(stack.decoder.embedding.weight, format,  # type: ignore[arg-type]
                       order_V=torch.arange(stack.spec.vocabulary).flip(0))
    stack = stack.rebuilt(dataclasses.replace(stack.spec, embedding_format=format), list(stack.decoder.layers),
                          embedding=table)
    with pytest.raises(BadOption, match=r"8 bits for 9 frequent tokens.*\n.*\n.*--allow-requantize"):
        GGUF().write(Source(stack), tmp_path / "model.gguf")
    for allowed, kind, near in ((Allowed(requantize=True), "Q8_0", 1e-2), (Allowed(dense=True), "F32", 1e-6)):
        GGUF().write(Source(stack), tmp_path / "model.gguf", allowed)
        found, values_VC = stored(tmp_path / "model.gguf")["token_embd.weight"]
        assert found == kind
        torch.testing.assert_close(values_VC, table.dense(), rtol=near, atol=near)


def test_a_choice_without_a_type_is_named_with_what_to_allow(tmp_path: Path) -> None:
    stack = quantized(stack_of("llama"), Quantize(6))
    with pytest.raises(BadOption, match=r"'q' of layer 0 in 6 bits.*\n.*\n.*--allow-requantize"):
        GGUF().write(Source(stack), tmp_path / "model.gguf")
    assert list(tmp_path.iterdir()) == []
    written = GGUF().write(Source(stack), tmp_path / "model.gguf", Allowed(requantize=True))
    assert any("7 rounded again" in note for note in written.notes)
    assert stored(tmp_path / "model.gguf")["blk.0.attn_q.weight"][0] == "Q8_0"
    GGUF().write(Source(stack), tmp_path / "model.gguf", Allowed(dense=True))
    assert stored(tmp_path / "model.gguf")["blk.0.attn_q.weight"][0] == "F32"


def test_few_bits_go_unchanged_into_a_wider_type_where_allowed(tmp_path: Path) -> None:
    stack = quantized(stack_of("qwen2"), Quantize(3))
    with pytest.raises(BadOption, match="--allow-wider"):
        GGUF().write(Source(stack), tmp_path / "model.gguf")
    written = GGUF().write(Source(stack), tmp_path / "model.gguf", Allowed(wider=True))
    kind, values = stored(tmp_path / "model.gguf")["blk.0.attn_q.weight"]
    matrix = stack.block(0).matrix("q")  # type: ignore[union-attr]
    assert kind == "Q4_1" and any("wider" in note for note in written.notes)
    torch.testing.assert_close(values, weights(matrix), rtol=1e-6, atol=float(matrix.zero.abs().max()) * 2**-10)


def test_a_dropped_layer_renumbers_the_others(tmp_path: Path) -> None:
    for stack in (stack_of("llama"), gemma()):
        blocks = [block for layer, block in enumerate(stack.decoder.layers) if layer != 1]
        slim = stack.rebuilt(stack.spec.with_rows({1: None}), blocks)
        GGUF().write(Source(slim), tmp_path / "model.gguf")
        again = open_stack(tmp_path / "model.gguf", dtype="float32")
        assert len(again) == len(stack) - 1
        torch.testing.assert_close(logits(again), logits(slim))


def test_a_llama_may_lose_halves_and_widths(tmp_path: Path) -> None:
    whole = stack_of("llama").spec
    narrow = dataclasses.replace(ROW, feed_forward=FeedForward(96), mixer=Attention(2, 1, 16))
    spec = whole.with_rows({0: narrow, 1: dataclasses.replace(ROW, mixer=None),
                            2: dataclasses.replace(ROW, feed_forward=None)})
    stack = filled(spec)
    GGUF().write(Source(stack), tmp_path / "model.gguf")
    again = open_stack(tmp_path / "model.gguf", dtype="float32")
    assert again.spec.rows[1].mixer is None and again.spec.rows[0] == narrow  # type: ignore[union-attr]
    torch.testing.assert_close(logits(again), logits(stack))


def test_what_no_layer_of_another_family_may_lose_is_refused(tmp_path: Path) -> None:
    spec = stack_of("qwen3").spec
    with pytest.raises(BadOption, match="qwen3 whose layers differ"):
        GGUF().write(Source(filled(spec.with_rows({0: dataclasses.replace(spec.rows[0], mixer=None)}))),
                     tmp_path / "model.gguf")
    headless = stack_of("llama").spec.with_rows({0: dataclasses.replace(ROW, mixer=None)})
    with pytest.raises(BadOption, match="without attention in its first layer"):
        GGUF().write(Source(filled(headless)), tmp_path / "model.gguf")
    shared = dataclasses.replace(ROW, mixer=Attention(4, 2, 16, shares=0))
    with pytest.raises(BadOption, match="shares keys and values with layer 0"):
        GGUF().write(Source(filled(stack_of("llama").spec.with_rows({2: shared}))), tmp_path / "model.gguf")


def test_factors_are_multiplied_where_allowed(tmp_path: Path) -> None:
    stack = filled(stack_of("llama").spec.with_rows({1: dataclasses.replace(ROW, ranks={"up": 8})}))
    with pytest.raises(BadOption, match="'up' of layer 1 as two factors of rank 8"):
        GGUF().write(Source(stack), tmp_path / "model.gguf")
    GGUF().write(Source(stack), tmp_path / "model.gguf", Allowed(dense=True))
    torch.testing.assert_close(logits(open_stack(tmp_path / "model.gguf", dtype="float32")), logits(stack),
                               rtol=1e-4, atol=1e-4)


def test_llama3_rotation_is_stored_as_divisors(tmp_path: Path) -> None:
    mixer = dataclasses.replace(ROW.mixer, rope=Rope(500_000.0, "llama3", factor=8.0))  # type: ignore[type-var]
    stack = filled(dataclasses.replace(stack_of("llama").spec, rows=(dataclasses.replace(ROW, mixer=mixer),) * 2))
    GGUF().write(Source(stack), tmp_path / "model.gguf")
    torch.testing.assert_close(logits(open_stack(tmp_path / "model.gguf", dtype="float32")), logits(stack))


def test_half_precision_is_stored_as_it_is(tmp_path: Path) -> None:
    for dtype, kind in (("bfloat16", "BF16"), ("float16", "F16")):
        stack = random_stack(2, dtype=dtype)
        GGUF().write(Source(stack), tmp_path / "model.gguf")
        kinds = {name: kind for name, (kind, _) in stored(tmp_path / "model.gguf").items()}
        assert kinds["blk.0.ffn_up.weight"] == kind and kinds["blk.0.ffn_norm.weight"] == "F32"

