"""The compiled products beside float64, in every format, and what must not matter to them."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from layerwise.nets import compiled
from layerwise.nets.native import NativeMatrix, gate_times, rms_norm
from layerwise.nets.packed import PackedLinear
from layerwise.spec import Format

pytestmark = pytest.mark.skipif(compiled.library() is None, reason="no C compiler with OpenMP")

FORMATS = [Format(2, 64), Format(3, 32), Format(4, 32), Format(4, 128, symmetric=True), Format(5, 64), Format(6, 96),
           Format(8, 32), Format(8, 0, symmetric=True), Format(8, 0), Format(4, 0)]


def layer(format: Format, outputs: int = 70, inputs: int = 192, bias: bool = False, seed: int = 0) -> PackedLinear:
    draw = torch.Generator().manual_seed(seed)
    padded = -(-inputs // (format.group or inputs))
    codes = torch.randint(2**format.bits, (outputs, inputs), generator=draw, dtype=torch.uint8)
    scale = torch.rand(outputs, padded, generator=draw) + 0.1
    zero = None if format.symmetric else torch.randn(outputs, padded, generator=draw)
    return PackedLinear.from_codes(codes, scale, zero, format, torch.randn(outputs, generator=draw) if bias else None)


def matrix(of: PackedLinear) -> NativeMatrix:
    found = of.lay_out()
    assert isinstance(found, NativeMatrix)
    return found


HALF_STEP = 2.0**-16
"""Of x in 16 bits, by the largest number of its group."""


def near(found: Tensor, exact: Tensor, x: Tensor, dense: Tensor, half_step: float = HALF_STEP) -> None:
    """The error of x is at most half a step of its fixed point, taken by the magnitude of the weights."""
    bound = x.double().abs().amax() * dense.abs().sum(1) * half_step
    assert ((found.double() - exact).abs() <= bound + 2.0**-20 * exact.abs()).all()


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 17])
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_products_are_those_of_float64(format: Format, rows: int) -> None:
    of, x = layer(format), torch.randn(rows, 192, generator=torch.Generator().manual_seed(1))
    dense = of.dense(torch.float64)
    near(matrix(of).product(x), x.double() @ dense.T, x, dense)


@pytest.mark.parametrize("outputs", [64, 37])
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_many_rows_are_multiplied_in_float32(format: Format, outputs: int) -> None:
    of, x = layer(format, outputs=outputs), torch.randn(75, 192, generator=torch.Generator().manual_seed(1))
    dense = of.dense(torch.float64)
    near(matrix(of).product(x), x.double() @ dense.T, x, dense, half_step=2.0**-22)


@pytest.mark.parametrize("outputs", [64, 37])
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_many_rows_in_bfloat16_are_rounded_once(format: Format, outputs: int) -> None:
    """What processors that multiply pairs of bfloat16 do, with the numbers of the matrix in bfloat16 as well."""
    of, found, y = layer(format, outputs=outputs), compiled.library(), torch.empty(61, outputs, dtype=torch.bfloat16)
    packed, x = matrix(of), torch.randn(61, 192, generator=torch.Generator().manual_seed(1)).bfloat16()
    x = torch.nn.functional.pad(x, (0, packed.inputs - 192))
    assert found is not None
    assert not found.packed_product(packed.address, x.data_ptr(), 61, None, y.data_ptr(), outputs, 1, 2)
    dense = of.dense(torch.bfloat16).double()
    near(y, x[:, :192].double() @ dense.T, x, dense, half_step=2.0**-9)


@pytest.mark.parametrize("inputs", [192, 150])
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_codes_come_back(format: Format, inputs: int) -> None:
    of = layer(format, inputs=inputs)
    before, stored = of.dense(), of.state_dict()["codes"].clone()
    if inputs == 150 and of.lay_out() is None:
        pytest.skip("no compiled product for groups of this size")
    matrix(of)
    assert torch.equal(of.dense(), before) and torch.equal(of.state_dict()["codes"], stored)
    assert torch.equal(of.dense_rows(3, 9), before[3:9])
    assert torch.equal(of.dense(torch.bfloat16), before.bfloat16())


def test_codes_of_4_and_8_bits_are_not_copied() -> None:
    for format in (Format(4, 32), Format(8, 64), Format(8, 0, symmetric=True)):
        of = layer(format)
        assert of.codes is not None and matrix(of).store.data_ptr() == of.codes.data_ptr()


def test_inputs_that_are_no_whole_groups() -> None:
    of, x = layer(Format(4, 64), inputs=150), torch.randn(3, 150)
    dense = of.dense(torch.float64)
    near(matrix(of).product(x), x.double() @ dense.T, x, dense)


def test_bias_and_bfloat16() -> None:
    of, x = layer(Format(4, 32), bias=True), torch.randn(3, 192, generator=torch.Generator().manual_seed(3)).bfloat16()
    assert of.bias is not None
    dense = of.dense(torch.float64)
    exact = x.double() @ dense.T + of.bias.double()
    found = matrix(of).product(x, of.bias)
    assert found.dtype == torch.bfloat16
    bound = 2.0**-8 * exact.abs() + HALF_STEP * x.double().abs().amax() * dense.abs().sum(1)
    assert ((found.double() - exact).abs() <= bound).all()


def test_a_row_does_not_depend_on_its_mates() -> None:
    of, x = layer(Format(4, 32)), torch.randn(7, 192)
    alone = torch.cat([matrix(of).product(row[None]) for row in x])
    assert torch.equal(matrix(of).product(x), alone)


def test_one_thread_gives_the_same_bits() -> None:
    of, x, threads = layer(Format(4, 32), outputs=500), torch.randn(2, 192), torch.get_num_threads()
    both = matrix(of).product(x)
    torch.set_num_threads(1)
    try:
        assert torch.equal(matrix(of).product(x), both)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_so_and_stays_in_its_row(bad: float) -> None:
    of, x = layer(Format(4, 32)), torch.randn(3, 192)
    clean = matrix(of).product(x)
    x[1, 100] = bad
    found = matrix(of).product(x)
    assert found[1].isnan().all() and torch.equal(found[[0, 2]], clean[[0, 2]])


@given(st.integers(-120, 100))
def test_tiny_and_huge_numbers(exponent: int) -> None:
    of, x = layer(Format(4, 32)), torch.randn(1, 192, generator=torch.Generator().manual_seed(2)) * 2.0**exponent
    dense = of.dense(torch.float64)
    if exponent > -90:  # below 1e-30 an input counts as zero
        near(matrix(of).product(x), x.double() @ dense.T, x, dense)
    else:
        assert matrix(of).product(x).abs().max() < 1e-20


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("sign", [1, -1])
def test_largest_sums_do_not_overflow(bits: int, sign: int) -> None:
    """All codes at their largest and x at one value: every product has the same sign."""
    codes = torch.full((4, 8192), 2**bits - 1, dtype=torch.uint8)
    of = PackedLinear.from_codes(codes, torch.ones(4, 1), torch.zeros(4, 1), Format(bits, 0))
    found = matrix(of).product(torch.full((1, 8192), sign * 3.0))
    torch.testing.assert_close(found, torch.full((1, 4), sign * 3.0 * (2 ** (bits - 1) - 1) * 8192), rtol=1e-5, atol=0)


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_rows_of_a_table(format: Format) -> None:
    of, chosen = layer(format), torch.tensor([69, 0, 3, 3])
    expected = of.dense(torch.float32)[chosen]
    assert torch.equal(matrix(of).values(chosen)[:, : expected.shape[1]], expected)
    for wrong in (-1, 70):
        with pytest.raises(IndexError, match=str(wrong)):
            matrix(of).values(torch.tensor([0, wrong]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_and_gate(dtype: torch.dtype) -> None:
    x, weight = 3 * torch.randn(5, 70).to(dtype), torch.rand(70)
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2.0**-7, "atol": 1e-3}
    exact = torch.nn.functional.rms_norm(x.double(), (70,), weight.double(), 1e-5)
    torch.testing.assert_close(rms_norm(x, weight, 1e-5), exact.to(dtype), **tolerance)
    gate, up = x.double().chunk(2, -1)
    silu, gelu = torch.nn.functional.silu(gate), torch.nn.functional.gelu(gate, approximate="tanh")
    torch.testing.assert_close(gate_times(x, "silu"), (silu * up).to(dtype), **tolerance)
    torch.testing.assert_close(gate_times(x, "gelu_tanh"), (gelu * up).to(dtype), **tolerance)


def test_without_the_library_torchs_kernels_are_used() -> None:
    program = ("from layerwise.nets.compiled import library; from layerwise.nets.int4 import Int4Matrix, tile_rows;"
               "from layerwise.spec import Format; from layerwise.nets.packed import PackedLinear;"
               "layer = PackedLinear(64, 64, Format(4, 32)); found = layer.lay_out();"
               "assert library() is None and isinstance(found, Int4Matrix) == (tile_rows() is not None)")
    subprocess.run([sys.executable, "-c", program], check=True, env={**os.environ, "LAYERWISE_NATIVE": "0"})
