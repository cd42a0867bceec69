"""`StackSpec`, the table: its rows and what surrounds them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

from layerwise.errors import BadOption
from layerwise.spec import values
from layerwise.spec.formats import DTYPE_BYTES, TableFormat
from layerwise.spec.mixers import Attention, Opaque
from layerwise.spec.row import LayerSpec, Norm, describe


@dataclass(frozen=True)
class StackSpec:
    """The table: rows, and what surrounds them. `extras` keeps configuration that layers do not need.

    For a module that layerwise did not build, rows are opaque and `outside` stands for all the rest.
    """

    family: str
    hidden: int
    vocabulary: int
    rows: tuple[LayerSpec, ...]
    tied: bool = True
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    context: int = 2048
    embedding_scale: float = 1.0
    learned_positions: int = 0
    final_norm: Norm = field(default_factory=Norm)
    logit_softcap: float | None = None
    embedding_format: TableFormat | None = None
    head_format: TableFormat | None = None
    outside: Opaque | None = None
    extras: Mapping[str, Any] = field(default_factory=dict)

    # sizes -------------------------------------------------------------------------------------

    def outside_bytes(self) -> int:
        """Stored bytes of everything that is not a row: embeddings, head, final norm."""
        if self.outside:
            return self.outside.bytes
        return self.embedding_bytes() + self.head_bytes() + self._rest() * DTYPE_BYTES[self.dtype]

    def embedding_bytes(self) -> int:
        return self._table_bytes(self.embedding_format)

    def head_bytes(self) -> int:
        """Zero for a tied head: it reads the embedding."""
        return 0 if self.tied else self._table_bytes(self.head_format)

    def bytes(self) -> int:
        """Stored bytes of the whole model."""
        return self.outside_bytes() + sum(row.bytes(self.hidden, self.dtype) for row in self.rows)

    def cache_bytes(self) -> float:
        """Bytes of cache per token of a sequence that fills the context."""
        return sum(row.cache_bytes(self.context, self.dtype) for row in self.rows)

    def parameters(self) -> int:
        """Number of parameters of the whole model; a tied head counts once."""
        return self._parameters

    @cached_property
    def _parameters(self) -> int:
        return self._outside_parameters() + sum(row.parameters(self.hidden) for row in self.rows)

    def _outside_parameters(self) -> int:
        if self.outside:
            return self.outside.parameters
        return (1 if self.tied else 2) * self.vocabulary * self.hidden + self._rest()

    def _table_bytes(self, packed: TableFormat | None) -> int:
        if packed:
            return packed.bytes(self.vocabulary, self.hidden)
        return self.vocabulary * self.hidden * DTYPE_BYTES[self.dtype]

    def _rest(self) -> int:
        return self.learned_positions * self.hidden + self.final_norm.parameters(self.hidden)

    # editing and comparing ---------------------------------------------------------------------

    def with_rows(self, rows: Mapping[int, LayerSpec | None]) -> StackSpec:
        """A copy with the given rows replaced, or removed where the new row is None.

        Rows that share an earlier row's keys and values follow it to its new place. Raises BadOption where that
        row is gone, comes later, or has other heads.
        """
        kept = {index: row for index, old in enumerate(self.rows) if (row := rows.get(index, old)) is not None}
        place = {index: new for new, index in enumerate(kept)}
        return replace(self, rows=tuple(_follow(index, row, kept, place) for index, row in kept.items()))

    @property
    def sources(self) -> frozenset[int]:
        """Rows whose keys and values a later row reads."""
        return frozenset(row.mixer.shares for row in self.rows
                         if isinstance(row.mixer, Attention) and row.mixer.shares is not None)

    def packed(self) -> bool:
        """Whether any matrix is stored in a packed format."""
        return bool(self.embedding_format or self.head_format or any(row.formats for row in self.rows))

    def diff(self, other: StackSpec) -> list[str]:
        """What differs, one line per value: `rows[3].mixer.window: 512 -> None`."""
        return list(values.differences("", self.to_json(), other.to_json()))

    def fingerprint(self) -> str:
        """A short hash of the table, equal for equal structures."""
        text = json.dumps(self.to_json(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    # reading and writing -----------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; rows that equal the row before them are still written in full."""
        return values.encode(self)  # type: ignore[no-any-return]

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> StackSpec:
        """The inverse of `to_json`. Raises BadOption on an unknown or missing key."""
        spec: StackSpec = values.decode(StackSpec, value)
        return spec

    def table(self) -> str:
        """A short text table, one line for a run of equal rows."""
        count = self.parameters()
        sizes = f"hidden {self.hidden}, vocabulary {self.vocabulary}, " if self.hidden else ""
        lines = [f"{self.family}: {sizes}{self.dtype}, "
                 f"{count / 1e6:{'.1f' if count >= 1e6 else '.3g'}}M parameters, "
                 f"{self.bytes() / 1e6:{'.1f' if self.bytes() >= 1e6 else '.3g'}} MB"]
        start = 0
        for index in range(1, len(self.rows) + 1):
            if index == len(self.rows) or self.rows[index] != self.rows[start]:
                span = f"{start}" if index == start + 1 else f"{start}-{index - 1}"
                lines.append(f"  {span:>7}  {describe(self.rows[start])}")
                start = index
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.table()


def _follow(index: int, row: LayerSpec, kept: Mapping[int, LayerSpec], place: Mapping[int, int]) -> LayerSpec:
    """The row with the layer it shares, if any, renumbered."""
    if not isinstance(row.mixer, Attention) or row.mixer.shares is None:
        return row
    source = row.mixer.shares
    found = kept[source].mixer if source in kept else None
    if (source >= index or not isinstance(found, Attention) or found.shares is not None
            or (found.kv_heads, found.head_dim) != (row.mixer.kv_heads, row.mixer.head_dim)):
        raise BadOption(f"layer {index}, which shares the keys and values of layer {source}",
                        expected="an earlier layer that stays, with keys of its own and the same heads",
                        do=f"keep the attention of layer {source}, or give layer {index} keys of its own")
    return replace(row, mixer=replace(row.mixer, shares=place[source]))
