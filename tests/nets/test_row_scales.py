"""Steps of a row: read back exactly, near to what was asked, and refused where they make no sense."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from layerwise.errors import BadOption
from layerwise.nets.row_scales import nearest_value, steps_of, values_of
from layerwise.spec import Format


@given(bits=st.sampled_from([4, 6]), signed=st.booleans(), power=st.integers(-20, 20), seed=st.integers(0, 200),
       least=st.integers(0, 7))
def test_steps_are_read_back_from_the_values_they_gave(bits: int, signed: bool, power: int, seed: int,
                                                       least: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    middle = 2 ** (bits - 1) if signed else 0
    most = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
    steps = torch.randint(-most if signed else 0, most + 1, (40, 9), generator=generator)
    steps[:, 0] = most - least * most // 16  # at least half of what fits
    row = (torch.rand(40, generator=generator) + 1).mul(2.0**power).bfloat16()
    values = values_of((steps + middle).to(torch.uint8), row, bits, signed)
    stored, row_again = steps_of(values, bits, signed)
    assert stored.dtype == torch.uint8 and int(stored.max()) < 2**bits
    assert torch.equal(values_of(stored, row_again, bits, signed), values)


@given(bits=st.sampled_from([4, 6]), signed=st.booleans(), seed=st.integers(0, 200))
def test_values_come_within_half_the_coarsest_step(bits: int, signed: bool, seed: int) -> None:
    values = torch.rand(30, 12, generator=torch.Generator().manual_seed(seed)) + 0.02
    values = (values * (torch.arange(12) % 2 * 2 - 1) if signed else values).bfloat16()
    stored, row = steps_of(values, bits, signed)
    back = values_of(stored, row, bits, signed)
    most = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
    bound = values.float().abs().amax(1, keepdim=True) / most
    assert ((back.float() - values.float()).abs() <= bound + 2**-8 * values.abs()).all()
    assert torch.equal(nearest_value(values.T.float(), row, bits, signed), back.T.float())
    if not signed:
        assert (back > 0).all(), "a small scale does not become 0"


def test_rows_of_zeros_stay_zero() -> None:
    for signed in (False, True):
        stored, row = steps_of(torch.zeros(3, 5), 6, signed)
        assert torch.equal(values_of(stored, row, 6, signed), torch.zeros(3, 5).bfloat16())


def test_formats() -> None:
    assert Format(3, 32, scale_bits=6).bytes(10, 96) == 10 * (36 + 2 * (3 + 2))
    assert Format(4, 32, True, 4).bytes(10, 96) == 10 * (48 + 2 + 2)
    assert Format(4, 32).bytes(10, 96) == 10 * (48 + 12)
    assert Format(3, 32, scale_bits=6).label == "3/32s6" and Format.parse("4/64=s4") == Format(4, 64, True, 4)
    assert Format.parse("4/32") == Format(4, 32)
    with pytest.raises(BadOption, match="scale_bits=8"):
        Format(4, 32, scale_bits=8)
    with pytest.raises(BadOption, match="whole row"):
        Format(4, 0, scale_bits=6)
