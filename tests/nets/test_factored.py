"""A matrix in two factors is one matrix to everything around it: sizes, files, streaming, packing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from layerwise.errors import BadModel, BadOption
from layerwise.io.save import save, standard_config
from layerwise.io.source import read
from layerwise.io.weights import build
from layerwise.measure.cost import flops
from layerwise.nets.decoder import Block, Decoder
from layerwise.nets.factored import FactoredLinear, build_linear
from layerwise.nets.flow import Flow
from layerwise.nets.packed import PackedLinear
from layerwise.spec import Attention, FeedForward, Format, LayerSpec, StackSpec, describe
from layerwise.stack.decoder import DecoderStack
from layerwise.stack.open import open as open_stack
from layerwise.testing.stacks import random_stack
from layerwise.transform.quantize import Quantize, values

ROW = LayerSpec(Attention(4, 2, 8, qkv_bias=True), FeedForward(48), ranks={"q": 9, "gate": 5, "down": 12},
                formats={"q": Format(4, 32), "up": Format(8, 0, True), "gate": Format(8, 0, True)})
SPEC = StackSpec("llama", 32, 61, (ROW, replace(ROW, ranks={}, formats={})), dtype="float32")


def random(spec: StackSpec) -> Decoder:
    generator = torch.Generator().manual_seed(0)
    decoder = Decoder(spec).requires_grad_(False).eval()
    for name, tensor in decoder.state_dict().items():
        if "codes" in name:
            tensor.copy_(torch.randint(1, 100, tensor.shape, generator=generator))
        else:
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
    return decoder


def logits(decoder: Decoder) -> Tensor:
    with torch.inference_mode():
        return decoder(torch.arange(9)[None], Flow(torch.arange(9)[None]))


@settings(deadline=None, max_examples=30)
@given(outputs=st.integers(1, 40), inputs=st.integers(1, 40), rank=st.integers(1, 12), bias=st.booleans(),
       format=st.sampled_from([None, Format(4, 32), Format(8, 0, True), Format(3, 16)]))
def test_stored_bytes_are_those_of_the_row(
        outputs: int, inputs: int, rank: int, bias: bool, format: Format | None) -> None:
    layer = build_linear(outputs, inputs, bias, format, rank)
    assert isinstance(layer, FactoredLinear)
    assert (layer.in_features, layer.out_features, layer.rank) == (inputs, outputs, rank)
    assert (layer.bias is not None) == bias
    row = LayerSpec(None, FeedForward(outputs, gated=False), formats={"up": format} if format else {},
                    ranks={"up": rank})
    stored = sum(tensor.nbytes for name, tensor in layer.state_dict().items() if not name.endswith("bias"))
    assert stored == row.matrix_bytes(inputs, "float32")["up"]


def test_the_table_counts_what_is_there() -> None:
    decoder = random(SPEC)
    assert sum(tensor.nbytes for tensor in decoder.state_dict().values()) == SPEC.bytes()
    dense = SPEC.rows[1].parameters(32)
    saved = 32 * 32 - 9 * (32 + 32) + 48 * 32 - 5 * (48 + 32) + 32 * 48 - 12 * (32 + 48)
    assert dense - ROW.parameters(32) == saved
    assert flops(SPEC.rows[1], 32, 1) - flops(ROW, 32, 1) == 2 * saved
    assert ROW.vectors(32) == SPEC.rows[1].vectors(32)


def test_ranks_are_part_of_the_table() -> None:
    assert StackSpec.from_json(SPEC.to_json()) == SPEC
    plain = replace(SPEC, rows=(replace(ROW, ranks={}), SPEC.rows[1]))
    assert plain.diff(SPEC) == ["rows[0].ranks.down: None -> 12", "rows[0].ranks.gate: None -> 5",
                                "rows[0].ranks.q: None -> 9"]
    assert "rank 9 q/5 gate/12 down" in describe(ROW)
    old = SPEC.to_json()
    for row in old["rows"]:
        del row["ranks"]  # a table written before there were ranks
    assert StackSpec.from_json(old).rows[1] == SPEC.rows[1]
    uniform = replace(SPEC, rows=(replace(ROW, formats={}),) * 2)
    assert standard_config(uniform) is None


def test_a_factored_layer_is_the_product_of_its_parts() -> None:
    block = random(SPEC).layers[0]
    assert isinstance(block, Block)
    for name, rank in ROW.ranks.items():
        layer = block.matrix(name)
        assert isinstance(layer, FactoredLinear)
        assert isinstance(layer.a, PackedLinear) == (name in ROW.formats) == isinstance(layer.b, PackedLinear)
        x = torch.randn(5, layer.in_features, generator=torch.Generator().manual_seed(0))
        weight = values(layer)
        assert torch.linalg.matrix_rank(weight) <= rank
        bias = 0 if layer.bias is None else layer.bias
        torch.testing.assert_close(layer(x), x @ weight.T + bias, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stream", [False, True])
def test_saved_opened_and_streamed(stream: bool, tmp_path: Path) -> None:
    decoder = random(SPEC)
    stack = DecoderStack(decoder, name="factored")
    folder = stack.save(tmp_path / "m")
    source = read(folder)
    assert source.spec == SPEC
    assert sum(tensor.nbytes for _, tensor in source.weights.stream()) == SPEC.bytes()
    assert logits(build(source.weights)).equal(logits(decoder))
    again = open_stack(folder, stream=stream)
    again.finite()
    assert torch.equal(again(torch.arange(9)[None]), logits(decoder))


def test_numbers_that_are_not_finite_are_named(tmp_path: Path) -> None:
    decoder = random(SPEC)
    decoder.state_dict()["layers.0.feed_forward.body.down.a.weight"][0, 0] = float("nan")
    save(tmp_path / "m", SPEC, decoder.state_dict().items())
    with pytest.raises(BadModel, match=r"down\.a\.weight"):
        read(tmp_path / "m").weights.finite()


def test_quantizing_packs_both_factors() -> None:
    row = LayerSpec(Attention(4, 2, 8), FeedForward(48), ranks={"q": 9, "down": 12})
    stack = random_stack(1, hidden=32, row=row)
    block = stack.block(0)
    assert isinstance(block, Block)
    eight = Quantize(8).apply(block, row)
    for name in row.ranks:
        layer = eight.matrix(name)
        assert isinstance(layer, FactoredLinear)
        assert isinstance(layer.a, PackedLinear)
        assert isinstance(layer.b, PackedLinear)
        assert (values(layer) - values(block.matrix(name))).norm() < 0.02 * values(layer).norm()
    new = Quantize(8).edit(row, 32)
    assert new.ranks == row.ranks
    assert Quantize(8).apply(eight, new).matrix("q") is eight.matrix("q")
    stored = sum(tensor.nbytes for tensor in eight.state_dict().values())
    assert stored == new.bytes(32, "float32")


def test_healing_in_another_dtype_keeps_the_factors() -> None:
    stack = random_stack(1, hidden=32, row=replace(ROW, formats={}))
    twin = stack.copied(torch.bfloat16)
    assert all(tensor.dtype == torch.bfloat16 for _, tensor in twin.tensors())
    assert isinstance(twin.block(0).matrix("q"), FactoredLinear)  # type: ignore[operator]


def test_experts_are_not_factored() -> None:
    with pytest.raises(BadOption, match="rank 4 for the matrix 'up'"):
        replace(ROW, feed_forward=FeedForward(16, experts=3, experts_per_token=1), ranks={"up": 4})
    with pytest.raises(BadOption, match="rank 0"):
        replace(ROW, ranks={"q": 0})
    assert isinstance(build_linear(3, 4, False), nn.Linear)
