"""Pieces join to the whole text, and no piece holds half a character."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from layerwise.generate.text import UNFINISHED, stream_text


class Bytes:
    """A tokenizer whose tokens are single bytes."""

    def decode(self, ids: Sequence[int], *, special: bool = True) -> str:
        return bytes(ids).decode("utf-8", errors="replace")


@given(st.text())
def test_pieces_join_to_the_text_and_hold_whole_characters(text: str) -> None:
    text = text.replace(UNFINISHED, "")
    pieces = list(stream_text(Bytes(), text.encode()))
    assert "".join(pieces) == text
    assert not any(UNFINISHED in piece or not piece for piece in pieces)


def test_a_line_is_shown_before_the_next_token_comes() -> None:
    stream = stream_text(Bytes(), iter(b"one\ntwo"))
    assert [next(stream) for _ in range(4)] == ["o", "n", "e", "\n"]


def test_what_never_becomes_whole_is_shown_at_the_end() -> None:
    assert "".join(stream_text(Bytes(), "é".encode()[:1])) == UNFINISHED
