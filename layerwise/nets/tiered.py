"""A token table in two formats: a wide one for the rows of frequent tokens, a narrow one for all others.

Rows of rare tokens are most of a table and take part in few predictions, so errors in them cost little.

Shapes: V vocabulary, C width.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from layerwise.errors import BadModel
from layerwise.nets.packed import PackedEmbedding
from layerwise.spec import Tiers


class TieredHead(nn.Module):
    """Two heads; `place` [V], int32, says in which row of the two, one after the other, a token's row is."""

    place: Tensor

    def __init__(self, frequent: nn.Module, rare: nn.Module, place_V: Tensor) -> None:
        super().__init__()
        self.frequent, self.rare = frequent, rare
        self.register_buffer("place", place_V.to(torch.int32))

    def logits(self, x: Tensor) -> Tensor:
        """x w', [..., V]."""
        logits = [part.logits(x) for part in (self.frequent, self.rare)]  # type: ignore[operator]
        return torch.cat(logits, -1).index_select(-1, self.place)


class TieredEmbedding(TieredHead):
    """Two packed tables as one; as an output head it reads the same storage."""

    frequent: PackedEmbedding
    rare: PackedEmbedding

    @classmethod
    def empty(cls, vocabulary: int, width: int, format: Tiers, dtype: torch.dtype = torch.bfloat16) -> Self:
        """A table of zeros, to be filled from a checkpoint; embeddings come out in `dtype`."""
        few, many = format.parts(vocabulary)
        return cls(PackedEmbedding.empty(few, width, format.frequent, dtype),
                   PackedEmbedding.empty(many, width, format.rare, dtype),
                   torch.zeros(vocabulary, dtype=torch.int32))

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        if not self.place.is_meta and not torch.equal(self.place.sort().values.cpu(), torch.arange(len(self.place))):
            raise BadModel("a token table whose tokens have no row each", expected="every row once in `place`",
                           do="save the model again")

    @property
    def dtype(self) -> torch.dtype:
        """Of the embeddings."""
        return self.frequent.dtype

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The table as numbers, [V, C]."""
        return torch.cat([self.frequent.dense(dtype), self.rare.dense(dtype)])[self.place]

    def forward(self, tokens: Tensor) -> Tensor:
        """Embeddings of `tokens` (any shape), [..., C] in `dtype`; only their rows are dequantised."""
        place_N, few = self.place[tokens.reshape(-1)], self.frequent.out_features
        out_NC = torch.empty(len(place_N), self.frequent.in_features, dtype=self.dtype, device=place_N.device)
        often_N = place_N < few
        out_NC[often_N] = self.frequent(place_N[often_N])
        out_NC[~often_N] = self.rare(place_N[~often_N] - few)
        return out_NC.view(*tokens.shape, self.frequent.in_features)


PackedTable = PackedEmbedding | TieredEmbedding
"""A token table that is stored in fewer bits."""
