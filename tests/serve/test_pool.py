"""What caches keep of keys and values in each precision, and in how many bytes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from layerwise.errors import BadOption
from layerwise.nets.key_codes import KEY_CODES
from layerwise.serve.pool import POOLS, Pool
from layerwise.serve.runner import Runner
from layerwise.serve.table import layer_table
from layerwise.spec import Attention, Precision
from layerwise.testing.stacks import random_stack
from tests.serve.plain import FULL

HEADS, BLOCK = 3, 4
STEPS: dict[Precision, float] = {"model": 0.0, "int8": 2 / 127, "int4": 2 / 15 + 1 / 64}
"""The largest error for numbers between -1 and 1, in their range: half a step, and in 4 bits bfloat16's rounding."""


def pool(precision: Precision, width: int = 64) -> Pool:
    return POOLS[precision](8, BLOCK, HEADS, width, torch.float32, torch.device("cpu"))


def numbers(tokens: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(HEADS, tokens, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_four_bits_are_sixteen_values_between_the_ends() -> None:
    x_D = torch.arange(16.0).repeat(2) - 3
    packed, low_G, step_G = KEY_CODES["int4"].encode(x_D)
    assert packed.tolist() == [value * 17 for value in range(16)]  # halves lie in the low and in the high bits
    assert (low_G.tolist(), step_G.tolist()) == ([-3.0], [1.0])


@pytest.mark.parametrize("width", [2, 16, 48, 64, 80, 128])
@pytest.mark.parametrize("precision", POOLS)
def test_what_is_written_is_read_within_half_a_step(precision: Precision, width: int) -> None:
    kept, k_KND, v_KND = pool(precision, width), numbers(6, width), numbers(6, width, 1) * 100 + 50
    kept.write(torch.tensor([9, 8, 4, 5, 6, 7]), k_KND, v_KND)
    k, v = kept.span(4, 10)
    order = [2, 3, 4, 5, 1, 0]
    assert (k[0, :, :] - k_KND[:, order]).abs().max() <= STEPS[precision] / 2 + 1e-6
    assert (v[0] - v_KND[:, order]).abs().max() <= STEPS[precision] * 100
    for gathered, spanned in zip(kept.gather(torch.tensor([[2, 1], [1, 2]])), (k, v), strict=True):
        assert torch.equal(gathered[1, :, :6], spanned[0]) and torch.equal(gathered[0, :, 4:], spanned[0, :, :4])


@pytest.mark.parametrize("precision", POOLS)
def test_moving_moves_all_parts(precision: Precision) -> None:
    kept, x_KND = pool(precision), numbers(3, 64)
    kept.write(torch.tensor([4, 6, 7]), x_KND, -x_KND)
    before = kept.span(4, 8)
    kept.move(torch.tensor([6, 7]), torch.tensor([4, 5]))
    for old, new in zip(before, kept.span(4, 8), strict=True):
        assert torch.equal(new[:, :, :2], old[:, :, 2:])


@pytest.mark.parametrize("value", [0.0, 3.0, -1e-20, 1e30])
@pytest.mark.parametrize("precision", POOLS)
def test_equal_numbers_and_extremes_stay_finite(precision: Precision, value: float) -> None:
    kept = pool(precision)
    kept.write(torch.tensor([0]), torch.full((HEADS, 1, 64), value), torch.zeros(HEADS, 1, 64))
    k, v = kept.span(0, 1)
    torch.testing.assert_close(k, torch.full_like(k, value), rtol=1e-2, atol=1e-9)
    assert not v.any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_table_counts_the_bytes_that_are_there(dtype: str) -> None:
    stack = random_stack(3)
    stack = stack.copied(getattr(torch, dtype))
    table = layer_table(stack.spec, precision={1: "int8", 2: "int4"})
    held = Runner(stack, table, 8, BLOCK).pools
    assert sum(store.nbytes for each in held if each for store in each._stores()) == sum(
        group.token_bytes for group in table.groups) * 8 * BLOCK


def test_heads_of_odd_width_have_no_four_bits() -> None:
    row = replace(FULL, mixer=Attention(heads=2, kv_heads=1, head_dim=7, rope=None))
    with pytest.raises(BadOption, match="heads have 7 numbers"):
        layer_table(replace(random_stack(1).spec, rows=(row,)), precision="int4")
