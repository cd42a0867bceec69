"""Text as it comes: pieces that are safe to show, from token ids that arrive one at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

UNFINISHED = "\ufffd"


class Decodes(Protocol):
    """Anything that turns token ids to text."""

    def decode(self, ids: Sequence[int], *, special: bool = True) -> str: ...


def stream_text(tokenizer: Decodes, ids: Iterable[int]) -> Iterator[str]:
    """The text of `ids`, piece by piece, without special tokens.

    A character whose bytes are spread over several tokens is held back until it is whole. Earlier tokens
    are decoded again with each new one, because a token's text may depend on the one before it; after each
    line only its last token is kept for that.
    """
    window: list[int] = []
    shown = ""
    for token in ids:
        window.append(token)
        text = tokenizer.decode(window, special=False)
        if text.endswith(UNFINISHED) or not text.startswith(shown):
            continue
        if len(text) > len(shown):
            yield text[len(shown) :]
        shown = text
        if text.endswith("\n"):
            window = [token]
            shown = tokenizer.decode(window, special=False)
    rest = tokenizer.decode(window, special=False) if window else ""
    if len(rest) > len(shown):
        yield rest[len(shown) :]
