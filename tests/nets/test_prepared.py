"""Blocks laid out for speed compute what the blocks they stand for compute."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from layerwise.generate.sample import next_logits
from layerwise.nets.compiled import library
from layerwise.nets.decoder import Block
from layerwise.nets.dense import Dense
from layerwise.nets.direct import FEW_ROWS, DirectAttention, FastRMSNorm, PrepackedLinear
from layerwise.nets.norms import RMSNorm
from layerwise.nets.prepared import DirectBlock
from layerwise.nets.wide import HalfLinear, WideRMSNorm, may_pair, may_widen
from layerwise.spec import Attention, FeedForward, LayerSpec
from layerwise.stack.decoder import Caches, DecoderStack
from layerwise.stack.prepared import prepared
from layerwise.testing.stacks import random_stack
from layerwise.transform.base import Transform
from layerwise.transform.drop import Drop
from layerwise.transform.quantize import Quantize
from layerwise.transform.share_kv import ShareKV

PLAIN = LayerSpec(Attention(heads=4, kv_heads=2, head_dim=16), FeedForward(width=96))
ROWS = {
    "plain": PLAIN,
    "biases": LayerSpec(Attention(4, 2, 16, qkv_bias=True, out_bias=True), FeedForward(96, bias=True)),
    "norms": replace(PLAIN, mixer=Attention(4, 2, 16, qk_norm=True, softcap=5.0), post_norm=True),
    "not gated": replace(PLAIN, feed_forward=FeedForward(96, gated=False, activation="gelu")),
    "experts": replace(PLAIN, feed_forward=FeedForward(32, experts=4, experts_per_token=2)),
}
EDITS: dict[str, Transform] = {
    "4 bits": Quantize(4), "5 bits": Quantize(5), "8 bits": Quantize(8, group=0, symmetric=True),
    "some of 4 bits": Quantize(4, matrices=("q", "v", "up")), "shared": ShareKV(0),
    "no attention": Drop("attention"), "no feed-forward": Drop("feed_forward")}
TOKENS_BT = torch.randint(97, (2, 21), generator=torch.Generator().manual_seed(2))


def agree(stack: DecoderStack, error: float = 1e-4) -> None:
    """`error` is that of float32, in standard deviations of the logits; half precision may differ by a tenth."""
    fast = prepared(stack)
    error = 0.1 if stack.spec.dtype == "bfloat16" else error
    with torch.inference_mode():
        expected, found = stack(TOKENS_BT), fast(TOKENS_BT)
        assert torch.isfinite(found).all()
        scale = float(expected.float().std())
        torch.testing.assert_close(found, expected, rtol=0, atol=scale * error, check_dtype=False)
        caches: tuple[Caches, Caches] = {}, {}
        for start, stop in ((0, 7), (7, 8), (8, 9), (9, 21)):
            parts = [next_logits(one, TOKENS_BT[:, start:stop], cache)
                     for one, cache in zip((stack, fast), caches, strict=True)]
            torch.testing.assert_close(*parts, rtol=0, atol=scale * error, check_dtype=False)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("row", ROWS)
def test_rows_of_any_kind(row: str, dtype: str) -> None:
    agree(random_stack(3, row=ROWS[row], dtype=dtype))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("edit", EDITS)
def test_edited_rows(edit: str, dtype: str) -> None:
    stack, change = random_stack(3, dtype=dtype), EDITS[edit]
    row = change.edit(stack.spec.rows[1], 64)
    blocks = [stack.block(layer) for layer in range(3)]
    changed = change.apply(blocks[1], stack.spec.rows[1])
    assert changed is not None
    agree(stack.rebuilt(stack.spec.with_rows({1: row}), [blocks[0], changed, blocks[2]]), error=2e-2)


def test_the_original_is_left_alone() -> None:
    stack = random_stack(2, dtype="bfloat16")
    before = {name: tensor.clone() for name, tensor in stack.tensors()}
    fast = prepared(stack)
    after = dict(stack.tensors())
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    block = fast.block(0)
    assert isinstance(block, Block) and block.attention is not None
    assert isinstance(block.attention.body, DirectAttention)


@pytest.mark.skipif(not PrepackedLinear.fits(torch.zeros(4, 4, dtype=torch.bfloat16)), reason="no oneDNN with bfloat16")
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_dense_layers_give_the_same_bits(tokens: int) -> None:
    x, weight, bias = (torch.randn(shape).bfloat16() for shape in ((1, tokens, 48), (96, 48), (96,)))
    for b in (None, bias):
        assert torch.equal(PrepackedLinear(weight, b)(x), torch.nn.functional.linear(x, weight, b))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 16, 40])
def test_norms_are_the_norm(tokens: int, dtype: torch.dtype) -> None:
    norm = RMSNorm(64, 1e-5, 0.0).to(dtype)
    norm.weight.data = torch.rand(64).to(dtype) + 0.5
    x = 3 * torch.randn(1, tokens, 64).to(dtype)
    exact = torch.nn.functional.rms_norm(x.double(), (64,), norm.weight.double(), 1e-5)
    found = FastRMSNorm(norm)(x)
    torch.testing.assert_close(found.double(), exact, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)


WIDE = may_widen(torch.device("cpu"), torch.bfloat16)


@pytest.mark.skipif(not WIDE, reason="this processor is fast in bfloat16")
def test_a_wide_stream_keeps_the_weights_small_and_is_nearer_to_float32() -> None:
    stack = random_stack(3, dtype="bfloat16")
    fast = prepared(stack)
    assert fast.dtype == torch.float32 and fast.spec.dtype == "float32"
    kinds = {type(module) for module in fast.block(0).modules()}
    assert HalfLinear in kinds and Dense not in kinds
    exact = stack.copied(torch.float32)(TOKENS_BT)
    torch.testing.assert_close(fast(TOKENS_BT), exact, rtol=0, atol=1e-3 * float(exact.std()))


@pytest.mark.skipif(library() is None, reason="no C compiler with OpenMP")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("inputs", [7, 16, 64, 70])
def test_half_precision_layers_multiply_the_stored_numbers(inputs: int, dtype: torch.dtype) -> None:
    weight, bias = torch.randn(95, inputs).to(dtype), torch.randn(95).to(dtype)  # tiles of outputs leave some over
    weight[0, :5] = torch.tensor([0.0, -0.0, 3e-7, -2e-5, 65000.0])
    for tokens in (1, 3, 4, 7, 17, 22, FEW_ROWS + 1):
        x = torch.randn(1, tokens, inputs)
        for b in (None, bias):
            exact = torch.nn.functional.linear(x.double(), weight.double(), None if b is None else b.double())
            torch.testing.assert_close(HalfLinear(weight, b)(x).double(), exact, rtol=1e-5, atol=1e-4)


@pytest.mark.skipif(library() is None, reason="no C compiler with OpenMP")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_half_precision_number_is_read_as_it_is(dtype: torch.dtype) -> None:
    """All 65,536 of them, those that are no numbers too, inside a step of the compiled loop and after its last one."""
    bits = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(dtype)
    for inputs, place in ((1, 0), (32, 6), (32, 9), (32, 31)):
        weight = torch.zeros(65536, inputs, dtype=dtype)
        weight[:, place] = bits
        found = HalfLinear(weight)(torch.eye(inputs)[None, place])[0]
        torch.testing.assert_close(found, bits.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.skipif(library() is None, reason="no C compiler with OpenMP")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("outputs", "inputs"), [(64, 2304), (33, 4100), (16, 1024), (200, 1030)])
def test_many_rows_of_large_matrices(outputs: int, inputs: int, dtype: torch.dtype) -> None:
    """Panels that take several parts of the inputs, and outputs that are no whole panel."""
    weight, bias, x = torch.randn(outputs, inputs).to(dtype), torch.randn(outputs), torch.randn(61, inputs)
    exact = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    torch.testing.assert_close(HalfLinear(weight, bias)(x).double(), exact, rtol=1e-5, atol=1e-3)


@pytest.mark.skipif(library() is None, reason="no C compiler with OpenMP")
def test_a_row_of_half_precision_does_not_depend_on_its_mates() -> None:
    layer, x = HalfLinear(torch.randn(43, 70).bfloat16()), torch.randn(90, 70)
    together = layer(x[:9])
    assert all(torch.equal(layer(x[row : row + 1])[0], together[row]) for row in range(9))
    many = layer(x)
    for first, count in ((0, 17), (5, 24), (61, 29), (1, 70)):
        assert torch.equal(layer(x[first : first + count]), many[first : first + count])


PAIRS = pytest.mark.skipif(not may_pair(torch.zeros(1, 1, dtype=torch.bfloat16)), reason="no pairs of bfloat16 here")


@PAIRS
@pytest.mark.parametrize(("outputs", "inputs", "rows"), [(64, 64, 20), (33, 4101, 90), (43, 70, 90), (64, 576, 1000)])
def test_any_number_of_rows_in_bfloat16(outputs: int, inputs: int, rows: int) -> None:
    """Outputs that are no whole tile, inputs that are no whole vector, more rows than meet all outputs at once."""
    layer, bias, found = HalfLinear(torch.randn(outputs, inputs).bfloat16()), torch.randn(outputs), library()
    x = torch.randn(rows, inputs).bfloat16()

    def product(first: int, count: int) -> torch.Tensor:
        some, y = x[first : first + count].clone(), torch.full((count, outputs + 3), 7.0, dtype=torch.bfloat16)
        assert found is not None and not found.dense_product(
            layer.address, some.data_ptr(), count, bias.data_ptr(), y.data_ptr(), outputs + 3, 1, 2)
        assert (y[:, outputs:] == 7).all()
        return y[:, :outputs]

    exact = torch.nn.functional.linear(x.double(), layer.weight.double(), bias.double())
    torch.testing.assert_close(product(0, rows).double(), exact, rtol=2**-8, atol=2e-3)
    for first, count in ((5, 9), (0, 1), (1, 4), (3, 17)):
        assert torch.equal(product(first, count), product(0, rows)[first : first + count])


@PAIRS
@pytest.mark.parametrize("inputs", [7, 32, 64, 70])
def test_products_in_bfloat16_are_rounded_once(inputs: int) -> None:
    weight, bias = torch.randn(95, inputs).bfloat16(), torch.randn(95).bfloat16()  # tiles of outputs leave some over
    for tokens in (1, 3, 4, 7, FEW_ROWS + 1):
        x = torch.randn(1, tokens, inputs).bfloat16()
        for b in (None, bias):
            exact = torch.nn.functional.linear(x.double(), weight.double(), None if b is None else b.double())
            found = HalfLinear(weight, b)(x)
            assert found.dtype == torch.bfloat16
            torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=1e-4)


@PAIRS
@pytest.mark.parametrize(("outputs", "inputs"), [(43, 70), (43, 64), (16, 32), (128, 96)])
def test_a_row_in_bfloat16_does_not_depend_on_its_mates(outputs: int, inputs: int) -> None:
    layer = HalfLinear(torch.randn(outputs, inputs).bfloat16(), torch.randn(outputs))
    rows = 2 * FEW_ROWS + 5
    x = torch.randn(rows, inputs).bfloat16()
    together = layer(x)
    assert all(torch.equal(layer(x[row : row + 1])[0], together[row]) for row in range(rows))
    for first, count in ((3, 2), (rows - 17, 17), (1, 33), (0, FEW_ROWS)):
        assert torch.equal(layer(x[first : first + count]), together[first : first + count])


@PAIRS
def test_a_matrix_unit_takes_rows_that_are_more_than_its_panel() -> None:
    layer, x = HalfLinear(torch.randn(33, 4096).bfloat16()), torch.randn(300, 4096).bfloat16()
    exact = torch.nn.functional.linear(x.double(), layer.weight.double())
    torch.testing.assert_close(layer(x).double(), exact, rtol=2**-8, atol=1e-3)


@PAIRS
def test_blocks_in_bfloat16_take_few_tokens_in_one_call() -> None:
    fast = prepared(random_stack(2, dtype="bfloat16"))
    block = fast.block(0)
    assert isinstance(block, DirectBlock) and block.step is not None
    layers = [module for module in block.modules() if isinstance(module, HalfLinear)]
    unit = all(torch.bfloat16 in layer.many for layer in layers)  # takes any number
    assert layers and block.step.takes(torch.zeros(1, 10**4, 64).bfloat16()) == unit


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_wide_norms_are_the_norm(offset: float) -> None:
    norm = RMSNorm(64, 1e-2, offset)
    norm.weight.data = torch.rand(64) + 0.5
    for x in (3 * torch.randn(2, 5, 64), torch.zeros(1, 1, 64), 1e-3 * torch.randn(1, 1, 64)):
        exact = torch.nn.functional.rms_norm(x.double(), (64,), norm.weight.double() + offset, 1e-2)
        torch.testing.assert_close(WideRMSNorm(norm)(x).double(), exact, rtol=1e-5, atol=1e-6)
