"""Packed matrices: kernels against float64, storage against the table's own arithmetic, round trips."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from layerwise.nets import native
from layerwise.nets.dense import linear
from layerwise.nets.int4 import Int4Matrix, tile_rows
from layerwise.nets.packed import FEW_ROWS, FEW_ROWS_INT8, PackedEmbedding, PackedLinear
from layerwise.nets.row_scales import steps_of, values_of
from layerwise.spec import BITS, Format

FORMATS = [Format(bits, group, symmetric)
           for bits in BITS for group in (0, 32, 64, 128, 48, 256) for symmetric in (True, False)]
FORMATS += [Format(bits, group, symmetric, scale_bits) for bits in (2, 3, 4) for group in (32, 48)
            for symmetric in (True, False) for scale_bits in (4, 6)]
HAVE_INT4 = tile_rows() is not None
COMPILED = native.library() is not None
needs_int4 = pytest.mark.skipif(not HAVE_INT4, reason="no int4 kernel of a known layout on this processor")
SHAPES = [(64, 256), (80, 200), (3, 48)]


@pytest.fixture
def torchs_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where there is no C compiler."""
    monkeypatch.setattr(native, "library", lambda: None)


def parts(outputs: int, inputs: int, format: Format, seed: int = 0) -> tuple[Tensor, Tensor, Tensor | None]:
    """Random codes (every value occurs), scales of both magnitudes, and zeros of both signs."""
    generator = torch.Generator().manual_seed(seed)
    groups = -(-inputs // (format.group or inputs))
    codes = torch.randint(2**format.bits, (outputs, inputs), generator=generator, dtype=torch.uint8)
    scale = (torch.rand(outputs, groups, generator=generator) + 0.01).bfloat16()
    zero = None if format.symmetric else (4 * torch.randn(outputs, groups, generator=generator)).bfloat16()
    if format.scale_bits != 16:
        scale = values_of(*steps_of(scale, format.scale_bits, False), format.scale_bits, False)
        zero = None if zero is None else values_of(*steps_of(zero, format.scale_bits, True), format.scale_bits, True)
    return codes, scale, zero


def reference(codes: Tensor, scale: Tensor, zero: Tensor | None, format: Format) -> Tensor:
    """w = (code - 2**(bits - 1)) * scale + zero in float64, by repeating each group's numbers."""
    spread = format.group or codes.shape[1]
    wide = [part.double().repeat_interleave(spread, 1)[:, : codes.shape[1]] for part in (scale, zero)
            if part is not None]
    dense = (codes.double() - 2 ** (format.bits - 1)) * wide[0]
    return dense if zero is None else dense + wide[1]


def assert_product_close(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    """One rounding to bfloat16 (2**-8 of the value at most, twice with a bias), and float32 sums before it.

    Where this processor has no kernel the weights are rounded too, each by 2**-8 of itself at most.
    """
    exact = x.double() @ weight.T
    terms = x.double().abs() @ weight.abs().T
    if bias is not None:
        exact, terms = exact + bias.double(), terms + bias.double().abs()
    each = 2**-20 if HAVE_INT4 or COMPILED else 2**-8
    bound = 2**-8 * exact.abs() + each * terms
    if COMPILED:  # x in fixed point of 16 bits
        bound += 2**-16 * x.double().abs().amax() * weight.abs().sum(1)
    if bias is not None:
        bound += 2**-8 * (exact - bias.double()).abs()
    assert ((y.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_dense_is_the_definition(format: Format, shape: tuple[int, int]) -> None:
    codes, scale, zero = parts(*shape, format)
    layer = PackedLinear.from_codes(codes, scale, zero, format)
    exact = reference(codes, scale, zero, format)
    assert torch.equal(layer.dense(torch.float64), exact)
    assert torch.equal(layer.dense(torch.float32), exact.float())
    assert torch.equal(layer.dense_rows(1, 3, torch.float64), exact[1:3])


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [1, 5])
def test_few_bfloat16_rows_match_float64(format: Format, shape: tuple[int, int], rows: int) -> None:
    codes, scale, zero = parts(*shape, format)
    layer = PackedLinear.from_codes(codes, scale, zero, format)
    x = torch.randn(rows, shape[1], generator=torch.Generator().manual_seed(1)).bfloat16()
    exact = reference(codes, scale, zero, format)
    if layer._kernel(x) is None:  # no kernel for this shape: the weights are rounded to bfloat16 as well
        assert torch.equal(layer(x), F.linear(x, layer.dense(torch.bfloat16)))
    else:
        assert_product_close(layer(x), x, exact)
    assert torch.equal(layer.dense(torch.float64), exact)


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_float32_is_exactly_the_dense_product(format: Format) -> None:
    codes, scale, zero = parts(80, 200, format)
    layer = PackedLinear.from_codes(codes, scale, zero, format)
    x = torch.randn(2, 3, 200, generator=torch.Generator().manual_seed(1))
    assert torch.equal(layer(x), F.linear(x, layer.dense(torch.float32)))


@needs_int4
def test_common_formats_use_a_kernel() -> None:
    x = torch.ones(1, 576).bfloat16()
    for format in (Format(8, 0, True), Format(4, 0), Format(3, 64, True), *(Format(b, 32) for b in BITS)):
        assert PackedLinear.from_codes(*parts(192, 576, format), format)._kernel(x) is not None, format
    assert not Int4Matrix.fits(Format(4, 48), 576)


@pytest.mark.parametrize("format", [Format(8, 0, True), Format(4, 32)])
def test_many_rows_equal_the_dense_product(format: Format) -> None:
    layer = PackedLinear.from_codes(*parts(64, 64, format), format)
    rows = max(FEW_ROWS_INT8, *FEW_ROWS.values()) + 1
    x = torch.randn(rows, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert torch.equal(layer(x), linear(x, layer.dense(torch.bfloat16)))


@pytest.mark.parametrize("format", [Format(8, 0, True), Format(5, 32), Format(4, 32)])
def test_bias_and_leading_shape(format: Format) -> None:
    bias = torch.randn(80, generator=torch.Generator().manual_seed(2)).bfloat16()
    codes, scale, zero = parts(80, 64, format)
    layer = PackedLinear.from_codes(codes, scale, zero, format, bias)
    x = torch.randn(2, 1, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert layer(x).shape == (2, 1, 80)
    assert_product_close(layer(x), x, reference(codes, scale, zero, format), bias)


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("used", [False, True])
def test_state_dict_round_trip_before_and_after_use(format: Format, used: bool) -> None:
    codes, scale, zero = parts(80, 224, format)
    layer = PackedLinear.from_codes(codes, scale, zero, format, torch.ones(80))
    if used:
        layer.product(torch.ones(1, 224).bfloat16())
    state = layer.state_dict()
    names = ["codes", "bias", "scale"] + ([] if format.symmetric else ["zero"])
    if format.scale_bits != 16:
        names += ["scale_row"] + ([] if format.symmetric else ["zero_row"])
    assert list(state) == names
    stored = sum(tensor.nbytes for name, tensor in state.items() if name != "bias")
    assert stored == format.bytes(80, 224)
    with torch.device("meta"):
        twin = PackedLinear.empty(80, 224, format, bias=True)
    twin.load_state_dict(state, assign=True)
    assert torch.equal(twin.dense(torch.float64), reference(codes, scale, zero, format))
    other = PackedLinear.empty(80, 224, format, bias=True)
    other.product(torch.ones(1, 224).bfloat16())
    other.load_state_dict(state)
    assert torch.equal(other.dense(torch.float64), twin.dense(torch.float64))


@needs_int4
def test_codes_are_never_held_twice(torchs_kernels: None) -> None:
    layer = PackedLinear.from_codes(*parts(64, 64, Format(4, 32)), Format(4, 32))
    layer(torch.ones(1, 64).bfloat16())
    assert layer.codes is None and isinstance(layer.tiled, Int4Matrix)
    assert layer.tiled.tiles.nbytes == 64 * 64 // 2


@needs_int4
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_torchs_kernels_match_float64(format: Format, torchs_kernels: None) -> None:
    codes, scale, zero = parts(80, 224, format)
    layer = PackedLinear.from_codes(codes, scale, zero, format)
    x = torch.randn(5, 224, generator=torch.Generator().manual_seed(1)).bfloat16()
    exact = reference(codes, scale, zero, format)
    if layer._kernel(x) is not None:
        assert_product_close(layer(x), x, exact)
    assert torch.equal(layer.dense(torch.float64), exact) and not isinstance(layer.tiled, native.NativeMatrix)


def test_changing_dtype_keeps_the_storage() -> None:
    format = Format(4, 32)
    layer = PackedLinear.from_codes(*parts(64, 64, format), format, torch.ones(64))
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    layer.product(torch.ones(1, 64).bfloat16())
    layer = copy.deepcopy(layer).double().bfloat16()
    after = layer.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in ("codes", "scale", "zero"))
    assert after["bias"].dtype == torch.bfloat16


@pytest.mark.parametrize("format", [Format(8, 0, True), Format(8, 32), Format(4, 32), Format(2, 64, True)])
@pytest.mark.parametrize("vocabulary", [128, 77])
def test_table_looks_rows_up_and_gives_logits_from_one_storage(format: Format, vocabulary: int) -> None:
    codes, scale, zero = parts(vocabulary, 64, format)
    table = PackedEmbedding.from_codes(codes, scale, zero, format)
    exact = reference(codes, scale, zero, format)
    tokens = torch.tensor([[0, 5, vocabulary - 1], [40, 5, 33]])
    assert torch.equal(table(tokens), exact[tokens].float().bfloat16())
    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert_product_close(table.logits(x), x, exact)
    assert torch.equal(table(tokens), exact[tokens].float().bfloat16()), "after the codes moved into tiles"
    assert table(tokens[:0]).shape == (0, 3, 64)
    assert table.float()(tokens).dtype == torch.float32


@pytest.mark.parametrize("format", [Format(8, 0, True), Format(6, 32), Format(4, 32)])
@pytest.mark.parametrize("offset", [1, 3, 8, 17])
def test_storage_and_x_at_any_address(format: Format, offset: int) -> None:
    layer = PackedLinear.from_codes(*parts(32, 64, format), format)
    state = layer.state_dict()
    shifted = {name: torch.cat([tensor.new_zeros(offset), tensor.flatten()])[offset:].view_as(tensor)
               for name, tensor in state.items()}
    twin = PackedLinear.empty(32, 64, format)
    twin.load_state_dict(shifted, assign=True)
    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    shifted_x = torch.cat([x.new_zeros(offset), x.flatten()])[offset:].view_as(x)
    assert torch.equal(twin(shifted_x), layer(x))
    assert torch.equal(twin(shifted_x[1:]), layer(x[1:]))


@pytest.mark.parametrize("format", [Format(8, 0, True), Format(4, 32)])
@pytest.mark.parametrize("inference", [False, True])
def test_gradients_reach_x(format: Format, inference: bool) -> None:
    with torch.inference_mode(inference):
        layer = PackedLinear.from_codes(*parts(64, 64, format), format)
        layer(torch.ones(1, 64).bfloat16())
    x = torch.randn(1, 64).bfloat16().requires_grad_()
    layer(x).sum().backward()
    assert x.grad is not None and torch.equal(x.grad, layer.dense(torch.bfloat16).sum(0, keepdim=True))
