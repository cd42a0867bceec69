"""Tokenizers small enough to know by heart."""

from __future__ import annotations

import re

import pytest


class ByteTokenizer:
    """One token per byte; nothing around a text."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())


class FramedTokenizer:
    """Bytes between a beginning (256) and an end (257)."""

    def encode(self, text: str) -> list[int]:
        return [256, *text.encode(), 257]


class WordTokenizer:
    """One token per word with the space before it, numbered as they come."""

    def __init__(self) -> None:
        self.words: dict[str, int] = {}

    def encode(self, text: str) -> list[int]:
        found = re.findall(r"\s?\w+|\s?[^\w\s]|\s", text)
        return [self.words.setdefault(word, len(self.words)) for word in found]


@pytest.fixture
def byte_tokenizer() -> ByteTokenizer:
    return ByteTokenizer()


@pytest.fixture
def framed_tokenizer() -> FramedTokenizer:
    return FramedTokenizer()


@pytest.fixture
def word_tokenizer() -> WordTokenizer:
    return WordTokenizer()
