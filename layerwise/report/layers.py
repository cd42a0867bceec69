"""What each layer got: two layer tables side by side, row by row; equal neighbours are merged for reading."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from layerwise.allocate.edits import edited_row
from layerwise.allocate.plan import Plan
from layerwise.spec import DTYPE_BYTES, Attention, LayerSpec, StackSpec, TableFormat, Tiers, describe

GONE = 0.0


@dataclass(frozen=True)
class LayerChange:
    """One row before and after.

    `layer` is the index before, or "embedding" or "head". `bits` gives the width at which each matrix is
    stored now, scales left out; 0 where the matrix is gone. `got` says the same in words.
    """

    layer: int | str
    got: str
    bytes_before: int
    bytes_after: int
    bits: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def layer_changes(before: StackSpec, after: StackSpec, kept: Sequence[int] | None = None) -> tuple[LayerChange, ...]:
    """One change for each row of `before`, and one for each table outside the rows.

    `kept` gives, for each row of `after`, its index in `before`; by default rows are taken in order, and
    where fewer are left, the last ones count as dropped.
    """
    indices = range(len(after.rows)) if kept is None else kept
    left = dict(zip(indices, after.rows, strict=True))
    rows = [_row_change(index, row, _as_before(left.get(index), indices), before, after)
            for index, row in enumerate(before.rows)]
    return (*rows, *_table_changes(before, after))


def kept_layers(spec: StackSpec, plan: Plan) -> list[int]:
    """The layers of `spec` that are left after `plan`, in order."""
    rows: dict[int, LayerSpec | None] = dict(enumerate(spec.rows))
    for edit in plan.edits:
        row = rows.get(edit.target) if isinstance(edit.target, int) else None
        if row is not None and isinstance(edit.target, int):
            rows[edit.target] = edited_row(row, spec.hidden, edit.transform, edit.arguments)
    return [layer for layer, row in rows.items() if row is not None]


def _as_before(row: LayerSpec | None, kept: Sequence[int]) -> LayerSpec | None:
    """The row with the layer whose keys it reads counted as before."""
    if row is None or not isinstance(row.mixer, Attention) or row.mixer.shares is None:
        return row
    return replace(row, mixer=replace(row.mixer, shares=kept[row.mixer.shares]))


def runs(changes: Sequence[LayerChange]) -> Iterator[tuple[str, str]]:
    """(`4-7`, what they got) for every run of neighbouring layers that got the same."""
    start = 0
    for index in range(1, len(changes) + 1):
        first, last = changes[start], changes[index - 1]
        if index < len(changes) and changes[index].got == first.got and _follows(last, changes[index]):
            continue
        yield (f"{first.layer}" if index == start + 1 else f"{first.layer}-{last.layer}"), first.got
        start = index


def _follows(a: LayerChange, b: LayerChange) -> bool:
    return isinstance(a.layer, int) and isinstance(b.layer, int)


def _row_change(layer: int, row: LayerSpec, new: LayerSpec | None, before: StackSpec, after: StackSpec) -> LayerChange:
    names = row.matrices(before.hidden)
    kept = new.matrices(after.hidden) if new else {}
    size = 8.0 * DTYPE_BYTES[after.dtype]
    bits = {name: _width(new, name, size) if new and name in kept else GONE for name in names}
    return LayerChange(
        layer,
        _words(row, new, bits, size),
        row.bytes(before.hidden, before.dtype),
        new.bytes(after.hidden, after.dtype) if new else 0,
        bits,
    )


def _width(row: LayerSpec, name: str, dense: float) -> float:
    return float(row.formats[name].bits) if name in row.formats else dense


def _words(row: LayerSpec, new: LayerSpec | None, bits: Mapping[str, float], dense: float) -> str:
    if new is None:
        return "dropped"
    parts = []
    if row.mixer is not None and new.mixer is None:
        parts.append("no attention")
    if row.feed_forward is not None and new.feed_forward is None:
        parts.append("no feed-forward")
    parts += _shapes(row, new)
    left = {name: width for name, width in bits.items() if width != GONE}
    packed = [width for width in left.values() if width != dense]
    if packed:
        parts.append(_widths(left))
    if not parts and (row.mixer, row.feed_forward) != (new.mixer, new.feed_forward):
        parts.append(describe(new))
    return ", ".join(parts) or "as it was"


def _shapes(row: LayerSpec, new: LayerSpec) -> Iterator[str]:
    """`64 of 128 channels`, `2 of 4 key-value heads`, `rank 96: q k; rank 200: up`."""
    if row.feed_forward and new.feed_forward and new.feed_forward.width < row.feed_forward.width:
        yield f"{new.feed_forward.width} of {row.feed_forward.width} channels"
    old, mixer = row.mixer, new.mixer
    if isinstance(old, Attention) and isinstance(mixer, Attention):
        if mixer.kv_heads < old.kv_heads:
            yield f"{mixer.kv_heads} of {old.kv_heads} key-value heads"
        if mixer.shares is not None and mixer.shares != old.shares:
            yield f"keys of layer {mixer.shares}"
        if mixer.cache != old.cache:
            yield f"cache {mixer.cache}"
    ranks = {name: rank for name, rank in new.ranks.items() if row.ranks.get(name) != rank}
    if ranks:
        yield "; ".join(f"rank {rank}: {' '.join(name for name in ranks if ranks[name] == rank)}"
                        for rank in sorted(set(ranks.values())))


def _widths(bits: Mapping[str, float]) -> str:
    """`4 bits`, or `8 bits: q k; 4 bits: gate up down`."""
    widths = sorted(set(bits.values()), reverse=True)
    if len(widths) == 1:
        return f"{widths[0]:g} bits"
    return "; ".join(f"{width:g} bits: {' '.join(name for name in bits if bits[name] == width)}" for width in widths)


def _table_changes(before: StackSpec, after: StackSpec) -> Iterator[LayerChange]:
    if before.outside or not before.vocabulary:
        return
    pairs = {"embedding": (before.embedding_bytes(), after.embedding_bytes(), after.embedding_format)}
    if not before.tied:
        pairs["head"] = before.head_bytes(), after.head_bytes(), after.head_format
    for name, (old, new, packed) in pairs.items():
        yield LayerChange(name, _table_words(packed), old, new, {"table": _table_bits(packed, after)})


def _table_words(packed: TableFormat | None) -> str:
    return packed.words if packed else "as it was"


def _table_bits(packed: TableFormat | None, spec: StackSpec) -> float:
    if isinstance(packed, Tiers):
        return packed.mean_bits(spec.vocabulary)
    return float(packed.bits) if packed else 8.0 * DTYPE_BYTES[spec.dtype]
