"""What a language model is given at once: token ids, and a mask where rows differ in length.

Shapes: B rows, T tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from layerwise.errors import BadData, BadOption


@dataclass(frozen=True)
class Batch:
    """`tokens_BT` int64; `mask_BT` bool, True at real tokens, None if all are; `labels_B` int64 or None.

    `inputs` are other named inputs of the model, such as pictures.
    """

    tokens_BT: Tensor
    mask_BT: Tensor | None = None
    labels_B: Tensor | None = None
    inputs: Mapping[str, Tensor] = field(default_factory=dict)


def pad(sequences: Sequence[Sequence[int]], value: int = 0) -> Batch:
    """Sequences of differing length as one batch, filled up on the right with `value`.

    Causal models need no mask for right padding: a real token never sees the filling. The mask is there
    to leave the filling out of every measurement. Raises BadData for no sequences or an empty one.
    """
    if not sequences or not all(sequences):
        raise BadData(
            "no sequences" if not sequences else "a sequence without tokens",
            expected="at least one sequence, each of at least one token",
            do="leave out empty texts",
        )
    width = max(map(len, sequences))
    tokens_BT = torch.full((len(sequences), width), value, dtype=torch.int64)
    mask_BT = torch.zeros((len(sequences), width), dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        tokens_BT[row, : len(sequence)] = torch.tensor(list(sequence), dtype=torch.int64)
        mask_BT[row, : len(sequence)] = True
    return Batch(tokens_BT, None if bool(mask_BT.all()) else mask_BT)


def slices(total: int, size: int) -> list[slice]:
    """Consecutive slices of `size` that cover `total` rows. Raises BadOption for a size below 1."""
    if size < 1:
        raise BadOption(f"a batch size of {size}", expected="at least 1", do="give a positive size")
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]


def common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    """How many leading tokens all sequences share."""
    columns = zip(*sequences, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, columns))


def check_tokens(tokens: Tensor, vocabulary: int) -> None:
    """Raises BadData if an id lies outside the model's vocabulary: the tokenizer belongs to another model."""
    low, high = (int(tokens.min()), int(tokens.max())) if tokens.numel() else (0, 0)
    if low < 0 or high >= vocabulary:
        raise BadData(
            f"token {low if low < 0 else high} for a model with {vocabulary} tokens",
            expected=f"token ids from 0 to {vocabulary - 1}",
            do="tokenize with the tokenizer that belongs to this model",
        )
