"""The same text in two tokenizations, paired where both have a token that ends at the same character."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from layerwise.data.text import encoder, frame
from layerwise.errors import BadData


class Reversible(Protocol):
    """A tokenizer that also turns ids back to text."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: list[int]) -> str: ...


@dataclass(frozen=True)
class Aligned:
    """Token ids of one text by either tokenizer, [1, T] and [1, S], and where both end a token, bool alike."""

    a_1T: Tensor
    b_1S: Tensor
    a_ends_1T: Tensor
    b_ends_1S: Tensor


def aligned(text: str, a: Reversible, b: Reversible) -> Aligned:
    """Pair two tokenizations of `text`; a state at a chosen place of one has read what its partner has read.

    Special tokens and tokens that end within a character have no partner. Raises BadData where no place has one.
    """
    ids_a, ends_a = _ends(text, a)
    ids_b, ends_b = _ends(text, b)
    common = (set(ends_a) & set(ends_b)) - {None}
    if not common:
        raise BadData(f"tokenizations of {text[:40]!r} that never end together", expected="tokens that end at words",
                      do="give a longer text")
    masks = [torch.tensor([[end in common for end in ends]]) for ends in (ends_a, ends_b)]
    return Aligned(torch.tensor([ids_a]), torch.tensor([ids_b]), *masks)


def _ends(text: str, tokenizer: Reversible) -> tuple[list[int], list[int | None]]:
    """Ids, and behind which character each token ends; None for special tokens and pieces of a character."""
    ids = encoder(tokenizer)(text)
    before, after = (len(side) for side in frame(encoder(tokenizer)))
    ends: list[int | None] = [None] * before
    for count in range(before + 1, len(ids) - after + 1):
        read = tokenizer.decode(ids[before:count])
        ends.append(len(read) if read and text.startswith(read) and len(read) not in ends else None)
    return ids, ends + [None] * after
