"""A small random model in place of the real ones, so that every line of a system runs in a few seconds."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

import pytest

from layerwise.stack.decoder import DecoderStack
from layerwise.testing.stacks import random_stack


class Bytes:
    """A tokenizer whose tokens are bytes."""

    eos = None

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int], *, special: bool = True) -> str:
        return bytes(ids).decode(errors="replace")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> DecoderStack:
    """Thirty layers of width 32 over bytes; `layerwise.open` gives it whatever is asked for."""
    stack = random_stack(30, hidden=32, vocabulary=256, dtype="bfloat16")
    stack.tokenizer = Bytes()  # type: ignore[assignment]
    monkeypatch.setattr(importlib.import_module("layerwise.stack.open"), "open", lambda *_, **__: stack)
    return stack
