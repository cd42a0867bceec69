"""Two tokenizations of one text, paired where both end."""

from __future__ import annotations

import pytest

from layerwise.data.aligned import aligned
from layerwise.errors import BadData


class Pieces:
    """Cuts a text every so many characters."""

    def __init__(self, size: int, offset: int = 0) -> None:
        self.size, self.offset = size, offset

    def encode(self, text: str) -> list[int]:
        return [sum(ord(letter) << (8 * i) for i, letter in enumerate(text[start : start + self.size]))
                for start in range(0, len(text), self.size)]

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(part) for value in ids for part in value.to_bytes(8, "little") if part)


def test_pairs_end_at_the_same_character() -> None:
    found = aligned("abcdefgh", Pieces(2), Pieces(3))
    assert found.a_1T.shape == (1, 4)
    assert found.a_ends_1T.tolist() == [[False, False, True, True]]
    assert found.b_ends_1S.tolist() == [[False, True, True]]


class Framed(Pieces):
    """Puts a special token before every text."""

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        return [1] * special + super().encode(text)


def test_special_tokens_have_no_partner() -> None:
    found = aligned("abcd", Framed(2), Pieces(2))
    assert found.a_ends_1T.tolist() == [[False, True, True]]
    assert found.b_ends_1S.tolist() == [[True, True]]


class Lossy(Pieces):
    def decode(self, ids: list[int]) -> str:
        return super().decode(ids).upper()


def test_nothing_in_common_is_refused() -> None:
    with pytest.raises(BadData, match="never end together"):
        aligned("abcd", Pieces(2), Lossy(2))
