"""A tokenizer whose tokens are words: for small models trained on sentences made by rule."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from layerwise.errors import BadData

_PIECE = re.compile(r"\w+|[^\w\s]")


class WordTokenizer:
    """Words and punctuation marks of the given texts, in alphabetical order; case matters, spaces do not.

    `encode` raises BadData for a word that none of the texts has. There are no special tokens.
    """

    eos: int | None = None

    def __init__(self, texts: Iterable[str]) -> None:
        self.words = tuple(sorted({word for text in texts for word in _PIECE.findall(text)}))
        self._ids = {word: index for index, word in enumerate(self.words)}

    @property
    def vocabulary(self) -> int:
        return len(self.words)

    def encode(self, text: str) -> list[int]:
        pieces = _PIECE.findall(text)
        unknown = [word for word in pieces if word not in self._ids]
        if unknown:
            raise BadData(
                f"the word {unknown[0]!r}",
                expected=f"one of the {len(self.words)} words that this tokenizer was made from",
                do="make it from texts that hold every word",
            )
        return [self._ids[word] for word in pieces]

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(self.words[index] for index in ids)
