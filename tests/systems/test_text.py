"""Texts of systems: prose from the half that is not verified on, and sums that are right."""

from __future__ import annotations

import re

import pytest

from layerwise.data import text_blocks
from layerwise.systems.text import prose, sums


class Bytes:
    def encode(self, text: str) -> list[int]:
        return list(text.encode())


def test_prose_is_calibration_text_and_follows_the_seed() -> None:
    one, other = prose(Bytes(), 3, 32, 1), prose(Bytes(), 3, 32, 2)
    assert one.tokens_NT.shape == (3, 32) and one.source.split == "calibration"
    assert one.source.chosen == text_blocks("default", Bytes(), length=32, blocks=3, seed=1).source.chosen
    assert one.source.chosen != other.source.chosen


@pytest.mark.parametrize("digits", [1, 3, 6])
def test_sums_are_right_and_have_as_many_digits_as_asked(digits: int) -> None:
    data = sums(Bytes(), digits, prompts=4, seed=0, length=80)
    assert data.tokens_NT.shape == (4, 80) and data.mask_NT is None
    for tokens_T in data.tokens_NT:
        lines = bytes(tokens_T.tolist()).decode().split("\n")[:-1]
        assert len(lines) >= 2, "whole lines, and the last cut off"
        for line in lines:
            a, b, total = map(int, re.fullmatch(r"(\d+) \+ (\d+) = (\d+)", line).groups())  # type: ignore[union-attr]
            assert a + b == total and len(str(a)) == len(str(b)) == digits


def test_the_seed_draws_the_numbers() -> None:
    one, same, other = (sums(Bytes(), 3, 2, seed).source.sha256 for seed in (1, 1, 2))
    assert one == same != other
