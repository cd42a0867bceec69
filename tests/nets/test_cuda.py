"""The layout of the int4 kernel on GPUs against the kernel's source; on a GPU, its products against float64."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import Tensor

from layerwise.nets import cuda
from layerwise.nets.cuda import CudaInt4, int4_runs, int8_runs, tiled, untiled
from layerwise.nets.int4 import kernel_group
from layerwise.nets.packed import PackedEmbedding, PackedLinear
from layerwise.spec import Format, Tiers
from layerwise.testing.stacks import random_stack
from layerwise.transform.quantize import pack_table
from tests.nets.test_packed import FORMATS, parts, reference

FITTING = [format for format in FORMATS if kernel_group(format, 256)]
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def by_the_kernel(nibbles: Tensor, words: int) -> Tensor:
    """`matrix_to_m16n8k16_Bint4_layout` of PyTorch, lane by lane."""
    outputs, inputs = nibbles.shape
    packed = nibbles[:, ::2].long() << 4 | nibbles[:, 1::2].long()
    out = torch.zeros(outputs // 8, inputs // (32 * words), 32, words, dtype=torch.long)
    for tile, depth, lane, word in itertools.product(*map(range, out.shape)):
        base = (depth * 2 * words + 2 * word) * 16 // 2
        v = [int(packed[tile * 8 + lane // 4, base + lane % 4 + offset]) for offset in (0, 4, 8, 12)]
        low = sum((byte >> 4) << (4 * place) for place, byte in enumerate(v))
        high = sum((byte & 15) << (16 + 4 * place) for place, byte in enumerate(v))
        out[tile, depth, lane, word] = low | high
    return torch.where(out >= 2**31, out - 2**32, out).int()


def some_nibbles(outputs: int, inputs: int) -> Tensor:
    return torch.randint(16, (outputs, inputs), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def test_where_the_first_word_has_its_inputs() -> None:
    nibbles = torch.zeros(8, 32, dtype=torch.uint8)
    nibbles[0, 0], nibbles[0, 1], nibbles[0, 8], nibbles[1, 2] = 1, 2, 3, 4
    tiles = tiled(nibbles, 1)
    assert tiles.shape == (1, 1, 32, 1)
    assert int(tiles[0, 0, 0, 0]) == 1 + (2 << 16) + (3 << 4) and int(tiles[0, 0, 5, 0]) == 4


@pytest.mark.parametrize("words", [1, 2, 4])
def test_tiles_are_those_of_the_kernel_and_read_back(words: int) -> None:
    nibbles = some_nibbles(16, 128 * words)
    tiles = tiled(nibbles, words)
    assert torch.equal(tiles, by_the_kernel(nibbles, words))
    rows = torch.tensor([15, 0, 7, 7, 8])
    assert torch.equal(untiled(tiles, rows), nibbles[rows])


@pytest.fixture
def plain_conversion(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's conversion in plain arithmetic, which exists without a GPU."""
    monkeypatch.setattr(cuda, "_convert", tiled)


@pytest.mark.usefixtures("plain_conversion")
@pytest.mark.parametrize("format", FITTING, ids=str)
@pytest.mark.parametrize("outputs", [64, 13])
def test_codes_and_values_come_back_from_the_kernels_numbers(format: Format, outputs: int) -> None:
    codes, scale, zero = parts(outputs, 256, format)
    matrix = CudaInt4.build(codes, scale, zero, format)
    assert torch.equal(matrix.codes(2, 9), codes[2:9])
    rows = torch.tensor([outputs - 1, 3, 3])
    assert torch.equal(matrix.gather(rows), codes[rows])
    nibbles = untiled(matrix.tiles, torch.arange(outputs)).double() - 8
    pairs = matrix.scale_zero[:, :outputs].double().repeat_interleave(matrix.group, 0)
    digits_IO = nibbles.T * pairs[..., 0] + pairs[..., 1]
    weight_OI = digits_IO.unflatten(0, (-1, 256)).sum(0).T
    assert torch.equal(weight_OI, reference(codes, scale, zero, format))


def test_no_gpu_means_no_kernel() -> None:
    assert not int4_runs(torch.device("cpu")) and not int8_runs(torch.device("cpu"))


def close(y: Tensor, x: Tensor, weight: Tensor) -> bool:
    """Weights, or both digits of them, are rounded to bfloat16, and so is the result; sums are float32."""
    exact, terms = x.double() @ weight.T, x.double().abs() @ weight.abs().T
    return bool(((y.double().cpu() - exact).abs() <= 2**-8 * exact.abs() + 2**-7 * terms).all())


@NO_GPU
@pytest.mark.gpu
@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("rows", [1, 17, 200])
def test_products_on_a_gpu_match_float64(format: Format, rows: int) -> None:
    codes, scale, zero = parts(80, 576, format)
    x, layer = torch.randn(rows, 576).bfloat16(), PackedLinear.from_codes(codes, scale, zero, format).cuda()
    stored = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    assert close(layer(x.cuda()), x, reference(codes, scale, zero, format))
    assert all(torch.equal(tensor, layer.state_dict()[name]) for name, tensor in stored.items())
    assert torch.equal(layer.cpu().dense(torch.float64), reference(codes, scale, zero, format))


@NO_GPU
@pytest.mark.gpu
def test_the_kernels_are_used_where_the_gpu_has_them() -> None:
    layer = PackedLinear.from_codes(*parts(80, 576, Format(4, 64)), Format(4, 64)).cuda()
    layer(torch.randn(1, 576).bfloat16().cuda())
    ampere = torch.cuda.get_device_capability() >= (8, 0) and torch.version.hip is None
    assert (layer.codes is None) == int4_runs(layer.scale.device) == ampere


@NO_GPU
@pytest.mark.gpu
@pytest.mark.parametrize("format", [Format(4, 64), Format(8, 0, symmetric=True)], ids=str)
def test_without_kernels_products_are_made_dense(format: Format, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "int4_runs", lambda device: False)
    monkeypatch.setattr("layerwise.nets.packed.int8_runs", lambda device: False)
    codes, scale, zero = parts(80, 576, format)
    x, layer = torch.randn(3, 576).bfloat16(), PackedLinear.from_codes(codes, scale, zero, format).cuda()
    assert close(layer(x.cuda()), x, reference(codes, scale, zero, format)) and layer.codes is not None


@NO_GPU
@pytest.mark.gpu
def test_a_tables_rows_are_read_before_and_after_a_product() -> None:
    format, tokens = Format(4, 32), torch.tensor([[3, 79], [0, 3]])
    codes, scale, zero = parts(80, 576, format)
    table = PackedEmbedding.from_codes(codes, scale, zero, format).cuda()
    before = table(tokens.cuda())
    table.logits(torch.randn(2, 576).bfloat16().cuda())
    assert torch.equal(table(tokens.cuda()), before)
    assert torch.equal(before.cpu(), reference(codes, scale, zero, format)[tokens].bfloat16())


@NO_GPU
@pytest.mark.gpu
def test_a_packed_model_predicts_the_same_on_a_gpu() -> None:
    import layerwise as lw
    from layerwise.allocate.plan import Edit

    stack = random_stack(3, hidden=64).copied(torch.bfloat16)
    edits = tuple(Edit(layer, "quantize", {"bits": bits, "group": 32}) for layer, bits in enumerate((8, 4, 3)))
    slim = lw.apply(stack, lw.Plan(stack.spec.fingerprint(), 3, edits))
    tokens = torch.randint(97, (2, 9), generator=torch.Generator().manual_seed(0))
    here = slim(tokens).float()
    slim.decoder.cuda()
    torch.testing.assert_close(slim(tokens.cuda()).float().cpu(), here, rtol=0.05, atol=0.05)


@NO_GPU
@pytest.mark.gpu
def test_a_table_in_two_formats_on_a_gpu() -> None:
    table = pack_table(torch.randn(97, 64).bfloat16(), Tiers(10, Format(8, 0, True), Format(4, 32)),
                       order_V=torch.randperm(97))
    tokens, x = torch.tensor([[3, 96], [0, 3]]), torch.randn(2, 64).bfloat16()
    there = copy.deepcopy(table).cuda()
    assert torch.equal(there(tokens.cuda()).cpu(), table(tokens))
    assert close(there.logits(x.cuda()), x, table.dense(torch.float64))
