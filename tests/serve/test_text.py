"""Text is shown as soon as it is safe, and never a part of a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from layerwise.serve.text import Writer


class Bytes:
    """A token is a byte."""

    def decode(self, ids: Sequence[int], *, special: bool = True) -> str:
        return bytes(ids).decode(errors="replace")


def shown(text: str, *stop: str) -> tuple[str, list[str], bool]:
    writer = Writer(Bytes(), stop)
    pieces = []
    for token in text.encode():
        pieces.append(writer.add(token))
        if writer.stopped:
            break
    pieces.append(writer.end())
    return "".join(pieces), pieces, writer.stopped


def test_what_may_become_a_stop_string_is_held_back() -> None:
    assert shown("abcXYZdef", "XYZ") == ("abc", ["a", "b", "c", "", "", "", ""], True)
    assert shown("abXYab", "XYZ") == ("abXYab", ["a", "b", "", "", "XYa", "b", ""], False)
    assert shown("abX", "XYZ") == ("abX", ["a", "b", "", "X"], False)


def test_characters_come_whole() -> None:
    assert shown("aé…") == ("aé…", ["a", "", "é", "", "", "…", ""], False)


def test_without_a_tokenizer_there_is_no_text() -> None:
    writer = Writer(None, ("a",))
    assert writer.add(97) == "" and writer.end() == "" and not writer.stopped


@given(st.text("ab\né", max_size=30), st.lists(st.text("abé", min_size=1, max_size=3), max_size=3))
def test_it_ends_before_the_first_stop_string(text: str, stops: list[str]) -> None:
    ends = [text.index(stop) + len(stop) for stop in stops if stop in text]
    before = text[: min(text.index(stop) for stop in stops if stop in text[: min(ends)])] if ends else text
    found, _, stopped = shown(text, *stops)
    assert (found, stopped) == (before, bool(ends))
