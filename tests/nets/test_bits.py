"""Dense bit streams: known bytes, and exact round trips for every width and length."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from layerwise.nets.bits import pack, stored_bytes, unpack
from layerwise.spec import BITS


@given(st.sampled_from(BITS), st.integers(0, 4), st.integers(1, 70), st.integers(0, 2**31))
def test_round_trip(bits: int, rows: int, columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(2**bits, (rows, columns), generator=generator, dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (rows, stored_bytes(columns, bits))
    assert torch.equal(unpack(packed, bits, columns), codes)


@pytest.mark.parametrize("bits", BITS)
def test_matches_the_integer_whose_digits_the_codes_are(bits: int) -> None:
    codes = torch.randint(2**bits, (1, 24), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    number = sum(code << (bits * index) for index, code in enumerate(codes[0].tolist()))
    assert bytes(pack(codes, bits)[0].tolist()) == number.to_bytes(24 * bits // 8, "little")


def test_eight_codes_take_as_many_bytes_as_a_code_has_bits() -> None:
    assert [stored_bytes(8, bits) for bits in BITS] == list(BITS)
