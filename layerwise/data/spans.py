"""Windows of words of a text, left out or covered up, to see which of them an answer hangs on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from layerwise.errors import BadOption


@dataclass(frozen=True)
class Span:
    """Words `first` up to but without `stop` of a text."""

    first: int
    stop: int


def spans(text: str, sizes: Sequence[int] = (3, 5, 7)) -> list[Span]:
    """Every window of each size that leaves at least one word. Raises BadOption for a size below one."""
    if not sizes or min(sizes) < 1:
        raise BadOption(f"windows of {sizes} words", expected="sizes of at least one", do="look at single words first")
    words = len(text.split())
    return [Span(first, first + size) for size in sizes if size < words for first in range(words - size + 1)]


def covered(text: str, span: Span, cover: str) -> str:
    """The text with every word of the span replaced by `cover`."""
    words = text.split()
    return " ".join([*words[: span.first], *[cover] * (span.stop - span.first), *words[span.stop :]])


def deleted(text: str, span: Span) -> str:
    """The text without the words of the span."""
    words = text.split()
    return " ".join([*words[: span.first], *words[span.stop :]])
