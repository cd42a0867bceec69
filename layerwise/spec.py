"""The layer table: `LayerSpec` is one row, `StackSpec` the whole model without its weights.

Rows are frozen and hold plain values, so a model's structure can be printed, compared, edited and
stored as JSON before any tensor is touched. Sizes follow from the table alone: `StackSpec.bytes`
equals what a saved file holds (a test compares the two).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from layerwise.errors import BadOption

BITS = (2, 3, 4, 5, 6, 8)
SCALE_BITS = (4, 6, 16)
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Format:
    """How a packed matrix is stored: integers of `bits` bits, one scale for `group` inputs of a row.

    `group` 0 means one scale per row. A symmetric format stores no zero point. Scales and zero points are
    bfloat16, or, with `scale_bits` 4 or 6, integers of as many bits times one bfloat16 number of the row each.
    """

    bits: int
    group: int = 0
    symmetric: bool = False
    scale_bits: int = 16

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise BadOption(f"bits={self.bits}", expected=f"one of {BITS}", do="choose a supported width")
        if self.group < 0:
            raise BadOption(f"group={self.group}", expected="0 (whole row) or a positive size", do="use group=32")
        if self.scale_bits not in SCALE_BITS or (self.scale_bits != 16 and not self.group):
            raise BadOption(f"scale_bits={self.scale_bits} in groups of {self.group or 'the whole row'}",
                            expected=f"one of {SCALE_BITS}, and groups where it is not 16",
                            do="use scale_bits=6 with group=32")

    @property
    def label(self) -> str:
        """A short name: `4/128` is 4 bits in groups of 128, `8/row=` symmetric with one scale a row, `3/32s6` has
        scales of 6 bits.
        """
        scales = "" if self.scale_bits == 16 else f"s{self.scale_bits}"
        return f"{self.bits}/{self.group or 'row'}{'=' if self.symmetric else ''}{scales}"

    @staticmethod
    def parse(label: str) -> Format:
        """The inverse of `label`. Raises BadOption for text that names no format."""
        match = re.fullmatch(r"(\d+)/(\d+|row)(=?)(?:s(\d+))?", label)
        if not match:
            raise BadOption(f"the format {label!r}", expected="bits/group, such as 4/128 or 8/row=",
                            do="correct the text")
        bits, group, symmetric, scale_bits = match.groups()
        return Format(int(bits), 0 if group == "row" else int(group), bool(symmetric), int(scale_bits or 16))

    def bytes(self, rows: int, columns: int) -> int:
        """Stored bytes of a `rows` x `columns` matrix: packed integers, scales, zero points.

        Rows are padded to whole groups and to whole bytes.
        """
        group = self.group or columns
        groups = math.ceil(columns / group)
        packed = math.ceil(groups * group * self.bits / 8) if self.group else math.ceil(columns * self.bits / 8)
        scales = groups * 2 if self.scale_bits == 16 else math.ceil(groups * self.scale_bits / 8) + 2
        return rows * (packed + scales * (1 if self.symmetric else 2))


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding: base `theta`, and the scaling that stretches it over long contexts."""

    theta: float = 10_000.0
    kind: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_context: int = 8192


@dataclass(frozen=True)
class Norm:
    """Layer normalisation: root mean square or mean-and-variance; the weight is `offset` + stored."""

    kind: Literal["rms", "layer"] = "rms"
    eps: float = 1e-5
    offset: float = 0.0

    def parameters(self, width: int) -> int:
        return width if self.kind == "rms" else 2 * width


@dataclass(frozen=True)
class Attention:
    """Softmax attention. `window` limits how many past tokens are seen; `None` means all of them.

    With `shares`, keys and values are those of that earlier layer, and the layer has no k and v matrices.
    """

    heads: int
    kv_heads: int
    head_dim: int
    window: int | None = None
    rope: Rope | None = Rope()
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: bool = False
    scale: float | None = None
    softcap: float | None = None
    shares: int | None = None

    def matrices(self, hidden: int) -> dict[str, tuple[int, int]]:
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        own = {} if self.shares is not None else {"k": (key, hidden), "v": (key, hidden)}
        return {"q": (query, hidden), **own, "o": (hidden, query)}

    def vectors(self, hidden: int) -> int:
        """Parameters that are not matrices: biases and query/key norms."""
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim * (self.shares is None)
        bias = (query + 2 * key) * self.qkv_bias + hidden * self.out_bias
        return bias + (1 if self.shares is not None else 2) * self.head_dim * self.qk_norm


@dataclass(frozen=True)
class FeedForward:
    """A feed-forward network of inner width `width`; with `experts` > 0 a routed mixture of them."""

    width: int
    gated: bool = True
    activation: Literal["silu", "gelu_tanh", "gelu", "relu"] = "silu"
    bias: bool = False
    experts: int = 0
    experts_per_token: int = 0
    normalize_router: bool = True

    def matrices(self, hidden: int) -> dict[str, tuple[int, int]]:
        copies = self.experts or 1
        shapes = {"up": (copies * self.width, hidden), "down": (copies * hidden, self.width)}
        return ({"gate": (copies * self.width, hidden)} if self.gated else {}) | shapes

    def vectors(self, hidden: int) -> int:
        """Parameters that are not packable matrices: biases and the router."""
        return self.bias * (self.width * (2 if self.gated else 1) + hidden) + self.experts * hidden


@dataclass(frozen=True)
class Opaque:
    """A layer of a module that layerwise did not build: run as it is, known by its path and class."""

    path: str
    type: str
    parameters: int
    bytes: int


@dataclass(frozen=True)
class LayerSpec:
    """One row: what the layer is and how each of its matrices is stored.

    `formats` maps a matrix name (q, k, v, o, gate, up, down) to its packed format; a matrix that is
    not named is dense in the stack's dtype. `ranks` maps a matrix name to R where the matrix is stored as the
    product of two factors, [outputs, R] and [R, inputs], both in the matrix's format. `mixer` or `feed_forward`
    is None where that half is gone.
    """

    mixer: Attention | Opaque | None
    feed_forward: FeedForward | None
    norm: Norm = Norm()
    post_norm: bool = False
    formats: Mapping[str, Format] = field(default_factory=dict)
    ranks: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        routed = self.feed_forward.matrices(1) if self.feed_forward and self.feed_forward.experts else {}
        for name, rank in self.ranks.items():
            if rank < 1 or name in routed:
                raise BadOption(f"rank {rank} for the matrix {name!r}",
                                expected="1 or more, for a matrix that is no stack of experts",
                                do="store it whole: remove its rank")

    def matrices(self, hidden: int) -> dict[str, tuple[int, int]]:
        """Name to (outputs, inputs) of every matrix that can be packed; experts are stacked on outputs."""
        attention = self.mixer.matrices(hidden) if isinstance(self.mixer, Attention) else {}
        return attention | (self.feed_forward.matrices(hidden) if self.feed_forward else {})

    def stored(self, hidden: int) -> dict[str, tuple[tuple[int, int], ...]]:
        """Name to the (outputs, inputs) of what is stored for a matrix: itself, or its two factors."""
        return {name: ((outputs, self.ranks[name]), (self.ranks[name], inputs)) if name in self.ranks
                else ((outputs, inputs),) for name, (outputs, inputs) in self.matrices(hidden).items()}

    def vectors(self, hidden: int) -> int:
        """Number of parameters outside the matrices."""
        norms = (1 + self.post_norm) * self.norm.parameters(hidden)
        total = 0
        if isinstance(self.mixer, Attention):
            total += norms + self.mixer.vectors(hidden)
        if self.feed_forward:
            total += norms + self.feed_forward.vectors(hidden)
        return total

    def parameters(self, hidden: int) -> int:
        if isinstance(self.mixer, Opaque):
            return self.mixer.parameters
        return sum(o * i for shapes in self.stored(hidden).values() for o, i in shapes) + self.vectors(hidden)

    def bytes(self, hidden: int, dtype: str) -> int:
        """Stored bytes: packed matrices in their format, everything else in `dtype`."""
        if isinstance(self.mixer, Opaque):
            return self.mixer.bytes
        return self.vectors(hidden) * DTYPE_BYTES[dtype] + sum(self.matrix_bytes(hidden, dtype).values())

    def matrix_bytes(self, hidden: int, dtype: str) -> dict[str, int]:
        """Stored bytes of every matrix by name."""
        size = DTYPE_BYTES[dtype]
        return {name: sum(self.formats[name].bytes(*shape) if name in self.formats else math.prod(shape) * size
                          for shape in shapes)
                for name, shapes in self.stored(hidden).items()}


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
    final_norm: Norm = Norm()
    logit_softcap: float | None = None
    embedding_format: Format | None = None
    head_format: Format | None = None
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

    def parameters(self) -> int:
        """Number of parameters of the whole model; a tied head counts once."""
        return self._outside_parameters() + sum(row.parameters(self.hidden) for row in self.rows)

    def _outside_parameters(self) -> int:
        if self.outside:
            return self.outside.parameters
        return (1 if self.tied else 2) * self.vocabulary * self.hidden + self._rest()

    def _table_bytes(self, packed: Format | None) -> int:
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
        return list(_differences("", self.to_json(), other.to_json()))

    def fingerprint(self) -> str:
        """A short hash of the table, equal for equal structures."""
        text = json.dumps(self.to_json(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    # reading and writing -----------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; rows that equal the row before them are still written in full."""
        return _encode(self)  # type: ignore[no-any-return]

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> StackSpec:
        """The inverse of `to_json`. Raises BadOption on an unknown or missing key."""
        spec: StackSpec = _decode(StackSpec, value)
        return spec

    def table(self) -> str:
        """A short text table, one line for a run of equal rows."""
        lines = [f"{self.family}: hidden {self.hidden}, vocabulary {self.vocabulary}, {self.dtype}, "
                 f"{self.parameters() / 1e6:.1f}M parameters, {self.bytes() / 1e6:.1f} MB"]
        start = 0
        for index in range(1, len(self.rows) + 1):
            if index == len(self.rows) or self.rows[index] != self.rows[start]:
                span = f"{start}" if index == start + 1 else f"{start}-{index - 1}"
                lines.append(f"  {span:>7}  {describe(self.rows[start])}")
                start = index
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.table()


def describe(row: LayerSpec) -> str:
    """One line of text for one row."""
    if isinstance(row.mixer, Opaque):
        return f"{row.mixer.type} at {row.mixer.path}"
    parts = []
    if row.mixer is None:
        parts.append("no attention")
    else:
        span = f"window {row.mixer.window}" if row.mixer.window else "full"
        shared = "" if row.mixer.shares is None else f", keys of layer {row.mixer.shares}"
        parts.append(f"attention {row.mixer.heads}/{row.mixer.kv_heads}x{row.mixer.head_dim} {span}{shared}")
    if row.feed_forward is None:
        parts.append("no feed-forward")
    else:
        experts = f", {row.feed_forward.experts} experts" if row.feed_forward.experts else ""
        kind = "gated" if row.feed_forward.gated else "plain"
        parts.append(f"{kind} feed-forward {row.feed_forward.width}{experts}")
    if row.ranks:
        parts.append("rank " + "/".join(f"{rank} {name}" for name, rank in row.ranks.items()))
    if row.formats:
        packed = sorted({f"{f.bits} bits" for f in row.formats.values()})
        parts.append("/".join(packed))
    return ", ".join(parts)


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


_KINDS = {cls.__name__: cls for cls in (Attention, FeedForward, Opaque)}


def _encode(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        fields = {f.name: _encode(getattr(value, f.name)) for f in dataclasses.fields(value)}
        kind = type(value).__name__
        return {"kind_of": kind, **fields} if kind in _KINDS else fields
    if isinstance(value, Mapping):
        return {str(key): _encode(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_encode(item) for item in value]
    return value


_CHILDREN: dict[tuple[type, str], type] = {
    (Attention, "rope"): Rope,
    (LayerSpec, "norm"): Norm,
    (StackSpec, "final_norm"): Norm,
    (StackSpec, "embedding_format"): Format,
    (StackSpec, "head_format"): Format,
    (StackSpec, "outside"): Opaque,
}


def _decode(cls: type, value: Mapping[str, Any]) -> Any:
    known = {f.name: f for f in dataclasses.fields(cls)}
    unknown = set(value) - set(known) - {"kind_of"}
    required = {name for name, f in known.items()
                if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING}
    missing = required - set(value)
    if unknown or missing:
        raise BadOption(
            f"a {cls.__name__} with unknown keys {sorted(unknown)} and missing keys {sorted(missing)}",
            expected=f"the keys {sorted(known)}", do="write the table with this version of layerwise")
    return cls(**{name: _decode_field(cls, name, item) for name, item in value.items() if name != "kind_of"})


def _decode_field(cls: type, name: str, item: Any) -> Any:
    if (cls, name) == (StackSpec, "rows"):
        return tuple(_decode(LayerSpec, row) for row in item)
    if (cls, name) == (LayerSpec, "formats"):
        return {matrix: _decode(Format, packed) for matrix, packed in item.items()}
    if isinstance(item, Mapping) and item.get("kind_of") in _KINDS:
        return _decode(_KINDS[item["kind_of"]], item)
    child = _CHILDREN.get((cls, name))
    return _decode(child, item) if child and item is not None else item


def _differences(path: str, a: Any, b: Any) -> Any:
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        for key in sorted(set(a) | set(b)):
            yield from _differences(f"{path}.{key}" if path else key, a.get(key), b.get(key))
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for index, (left, right) in enumerate(zip(a, b, strict=True)):
            yield from _differences(f"{path}[{index}]", left, right)
    elif isinstance(a, list) and isinstance(b, list):
        yield f"{path}: {len(a)} entries -> {len(b)} entries"
    elif a != b:
        yield f"{path}: {a} -> {b}"
