"""Quantize as a row edit and as packed weights: formats, methods, biases, experts, tables, refusals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from layerwise.errors import BadData, BadModel, BadOption
from layerwise.io.save import save
from layerwise.io.source import read
from layerwise.io.weights import build
from layerwise.nets.decoder import Block
from layerwise.nets.packed import PackedEmbedding, PackedLinear
from layerwise.spec import BITS, Attention, FeedForward, Format, LayerSpec, Opaque
from layerwise.stack.decoder import DecoderStack
from layerwise.testing.stacks import random_stack
from layerwise.testing.transforms import check_transform
from layerwise.transform.gram import grams
from layerwise.transform.quantize import Quantize, default_format, pack_table, values

BIASED = LayerSpec(Attention(4, 2, 16, qkv_bias=True), FeedForward(96, bias=True))
EXPERTS = LayerSpec(Attention(4, 2, 16), FeedForward(32, experts=4, experts_per_token=2))


@pytest.fixture(scope="module")
def stack() -> DecoderStack:
    return random_stack(2)


def block_of(stack: DecoderStack, layer: int = 0) -> Block:
    block = stack.block(layer)
    assert isinstance(block, Block)
    return block


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("method", ["nearest", "search", "gptq", "descent"])
def test_contract(stack: DecoderStack, bits: int, method: str) -> None:
    check_transform(Quantize(bits, method=method), stack)  # type: ignore[arg-type]


@pytest.mark.parametrize("transform", [
    Quantize(4, group=48), Quantize(3, scale_bits=6, method="search"),
    Quantize(4, group=16, symmetric=True, scale_bits=4), Quantize(3, group=0, symmetric=False), Quantize(8, group=32),
    Quantize(5, symmetric=True, matrices=("q", "down")), Quantize(4, matrices=())], ids=str)
@pytest.mark.parametrize("row", [BIASED, EXPERTS], ids=["biased", "experts"])
def test_contract_of_other_formats_and_rows(transform: Quantize, row: LayerSpec) -> None:
    check_transform(transform, random_stack(1, row=row))


def test_default_formats() -> None:
    assert Quantize().format == default_format(8) == Format(8, 0, symmetric=True)
    assert [Quantize(bits).format for bits in BITS[:-1]] == [Format(bits, 32) for bits in BITS[:-1]]
    assert Quantize(8, group=64).format == Format(8, 64, symmetric=True)


def test_only_compensation_needs_statistics_and_search_uses_them() -> None:
    assert Quantize.needs == Quantize(4).needs == Quantize(4, method="search").needs == frozenset()
    assert Quantize(4, method="descent").needs == {"gram"} == Quantize(4, method="search").wants
    assert Quantize.wants == Quantize(4).wants == Quantize(4, method="gptq").wants == frozenset()
    assert Quantize(4, method="gptq").needs == replace(Quantize(3), method="gptq").needs == {"gram"}


def test_edit_leaves_other_formats_alone(stack: DecoderStack) -> None:
    row = Quantize(8).edit(stack.spec.rows[0], 64)
    row = Quantize(4, matrices=("up", "gate")).edit(row, 64)
    assert {name: packed.bits for name, packed in row.formats.items()} == {
        "q": 8, "k": 8, "v": 8, "o": 8, "gate": 4, "up": 4, "down": 8}


def test_names_that_a_row_lacks_are_passed_over(stack: DecoderStack) -> None:
    row = replace(stack.spec.rows[0], mixer=None)
    transform = Quantize(4, matrices=("q", "up"))
    assert set(transform.edit(row, 64).formats) == {"up"}
    block = transform.apply(block_of(stack).without("attention"), row)
    assert isinstance(block.matrix("up"), PackedLinear)


def test_untouched_parts_are_shared(stack: DecoderStack) -> None:
    block = block_of(stack)
    new = Quantize(4, matrices=("up",)).apply(block, stack.spec.rows[0])
    assert new.matrix("down") is block.matrix("down")
    assert new.attention is block.attention
    assert not isinstance(block.matrix("up"), PackedLinear)


def test_block_runs_on_the_dequantised_weights() -> None:
    stack = random_stack(1, row=BIASED)
    block = block_of(stack)
    packed = Quantize(4).apply(block, BIASED)
    dense = {name: torch.nn.Linear(1, 1) for name in block.matrices()}
    for name, twin in dense.items():
        twin.weight, twin.bias = torch.nn.Parameter(values(packed.matrix(name))), block.matrix(name).bias
    state = stack.start(torch.arange(12).view(2, 6))
    reference = block.with_matrices(dense)(state.hidden, state.shared, 0)
    torch.testing.assert_close(packed(state.hidden, state.shared, 0), reference, rtol=1e-5, atol=1e-5)


def test_packed_matrices_are_rounded_again_from_their_values(stack: DecoderStack) -> None:
    block, row = block_of(stack), stack.spec.rows[0]
    eight = Quantize(8, matrices=("q",)).apply(block, row)
    four = Quantize(4, matrices=("q",)).apply(eight, row)
    again = Quantize(4, matrices=("q",)).apply(four, row)
    assert four.matrix("q").format.bits == 4  # type: ignore[union-attr]
    assert again.matrix("q") is four.matrix("q")
    assert 0 < (values(four.matrix("q")) - values(block.matrix("q"))).abs().max() < 0.1


def test_gptq_brings_outputs_closer_than_rounding(stack: DecoderStack) -> None:
    block, row = block_of(stack), stack.spec.rows[0]
    state = stack.start(torch.randint(97, (8, 60), generator=torch.Generator().manual_seed(0)))
    stats = grams(block, 0, [state])
    exact = block(state.hidden, state.shared, 0)
    packed = (Quantize(2, method=method).apply(block, row, stats) for method in ("nearest", "gptq"))
    near, gptq = (((new(state.hidden, state.shared, 0) - exact) ** 2).mean() for new in packed)
    assert gptq < 0.7 * near


@pytest.mark.parametrize("method", ["gptq", "descent"])
def test_matrices_rounded_together_are_those_rounded_alone(stack: DecoderStack, method: str) -> None:
    block, row = block_of(stack), stack.spec.rows[0]
    state = stack.start(torch.randint(97, (8, 60), generator=torch.Generator().manual_seed(0)))
    stats = grams(block, 0, [state])
    together = Quantize(3, method=method).apply(block, row, stats)  # type: ignore[arg-type]
    for name in block.matrices():
        alone = Quantize(3, method=method, matrices=(name,)).apply(block, row, stats)  # type: ignore[arg-type]
        agree = values(alone.matrix(name)) == values(together.matrix(name))
        assert agree.float().mean() > 0.99, "but for sums of another order"


def test_search_with_statistics_brings_outputs_closer(stack: DecoderStack) -> None:
    block, row = block_of(stack), stack.spec.rows[0]
    skewed = torch.diag(torch.logspace(-3, 3, 64))
    error = (values(Quantize(3, method="search", matrices=("q",)).apply(block, row, stats).matrix("q"))
             - values(block.matrix("q")) for stats in ({"q": skewed}, None))
    weighed, plain = (((part @ skewed) * part).sum() for part in error)
    assert weighed < 0.9 * plain


@pytest.mark.parametrize("symmetric", [True, False])
def test_scales_of_few_bits_survive_saving(stack: DecoderStack, symmetric: bool, tmp_path: Path) -> None:
    transform = Quantize(3, group=16, symmetric=symmetric, method="search", scale_bits=6)
    rows = {layer: transform.edit(row, 64) for layer, row in enumerate(stack.spec.rows)}
    spec = replace(stack.spec.with_rows(rows), embedding_format=Format(4, 32, scale_bits=6))  # type: ignore[arg-type]
    blocks = [transform.apply(block_of(stack, layer), row) for layer, row in enumerate(stack.spec.rows)]
    table = pack_table(values(stack.decoder.embedding), Format(4, 32, scale_bits=6), "search")
    slim = stack.rebuilt(spec, blocks, embedding=table)
    save(tmp_path / "slim", spec, slim.tensors())
    weights = read(tmp_path / "slim").weights
    assert sum(tensor.nbytes for _, tensor in weights.stream()) == spec.bytes() < stack.spec.bytes() / 4
    again = DecoderStack(build(weights))
    stored = dict(again.tensors())
    for name, tensor in slim.tensors():
        assert torch.equal(stored[name], tensor)
    tokens = torch.arange(12).view(2, 6)
    assert torch.equal(again(tokens), slim(tokens))


def test_a_table_is_packed_in_its_own_dtype() -> None:
    weight = torch.randn(50, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    table = pack_table(weight, Format(8, 0, symmetric=True))
    assert isinstance(table, PackedEmbedding)
    tokens = torch.tensor([3, 49])
    assert table(tokens).dtype == torch.bfloat16
    assert (table(tokens) - weight[tokens]).abs().max() < 0.03
    nearest, searched = (((pack_table(weight, Format(4, 32), method).dense() - weight) ** 2).mean()
                         for method in ("nearest", "gptq"))
    assert searched < nearest
    assert values(table).dtype == torch.bfloat16


def test_refusals(stack: DecoderStack) -> None:
    with pytest.raises(BadOption, match="bits=7"):
        Quantize(7)
    with pytest.raises(BadOption, match="method='fast'"):
        Quantize(4, method="fast")  # type: ignore[arg-type]
    with pytest.raises(BadOption, match="both or none"):
        Quantize(4, frequent="8/row=")
    with pytest.raises(BadOption, match="a token table"):
        Quantize(4, frequent="8/row=", frequent_rows=5).edit(stack.spec.rows[0], 64)
    with pytest.raises(BadOption, match="-1 rows"):
        Quantize(4, frequent="8/row=", frequent_rows=-1)
    with pytest.raises(BadOption, match=r"\['qkv'\]"):
        Quantize(4, matrices=("q", "qkv"))
    with pytest.raises(BadOption, match="conv1"):
        Quantize(4).edit(LayerSpec(Opaque("conv1", "Conv2d", 1, 4), None), 64)
    with pytest.raises(BadData, match="matrix 'q' without statistics"):
        Quantize(4, method="gptq").apply(block_of(stack), stack.spec.rows[0])
    broken = torch.nn.Linear(64, 64, bias=False)
    torch.nn.init.constant_(broken.weight, float("nan"))
    with pytest.raises(BadModel, match="4096 of 4096 weights of matrix 'q'"):
        Quantize(4).apply(block_of(stack).with_matrices({"q": broken}), stack.spec.rows[0])
