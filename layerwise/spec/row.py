"""`LayerSpec`, one row of the table: what the layer is, and how each of its matrices is stored."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from layerwise.errors import BadOption
from layerwise.spec.formats import DTYPE_BYTES, Format
from layerwise.spec.mixers import Mixer, Opaque


@dataclass(frozen=True)
class Norm:
    """Layer normalisation: root mean square or mean-and-variance; the weight is `offset` + stored."""

    kind: Literal["rms", "layer"] = "rms"
    eps: float = 1e-5
    offset: float = 0.0

    def parameters(self, width: int) -> int:
        return width if self.kind == "rms" else 2 * width


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
class LayerSpec:
    """One row: what the layer is and how each of its matrices is stored.

    `formats` maps a matrix name (q, k, v, o, in_proj, out_proj, gate, up, down) to its packed format; a
    matrix that is not named is dense in the stack's dtype. `ranks` maps a matrix name to R where the matrix is stored
    as the product of two factors, [outputs, R] and [R, inputs], both in the matrix's format. `mixer` or
    `feed_forward` is None where that half is not there.
    """

    mixer: Mixer | Opaque | None
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
        mixing = self.mixer.matrices(hidden) if isinstance(self.mixer, Mixer) else {}
        return mixing | (self.feed_forward.matrices(hidden) if self.feed_forward else {})

    def stored(self, hidden: int) -> dict[str, tuple[tuple[int, int], ...]]:
        """Name to the (outputs, inputs) of what is stored for a matrix: itself, or its two factors."""
        return {name: ((outputs, self.ranks[name]), (self.ranks[name], inputs)) if name in self.ranks
                else ((outputs, inputs),) for name, (outputs, inputs) in self.matrices(hidden).items()}

    def vectors(self, hidden: int) -> int:
        """Number of parameters outside the matrices."""
        norms = (1 + self.post_norm) * self.norm.parameters(hidden)
        total = 0
        if isinstance(self.mixer, Mixer):
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

    def cache_bytes(self, context: int, dtype: str) -> float:
        """Bytes that serving keeps per token of a sequence of `context` tokens, as computed in `dtype`."""
        return self.mixer.cache_bytes(context, dtype) if isinstance(self.mixer, Mixer) else 0.0

    def matrix_bytes(self, hidden: int, dtype: str) -> dict[str, int]:
        """Stored bytes of every matrix by name."""
        size = DTYPE_BYTES[dtype]
        return {name: sum(self.formats[name].bytes(*shape) if name in self.formats else math.prod(shape) * size
                          for shape in shapes)
                for name, shapes in self.stored(hidden).items()}


def describe(row: LayerSpec) -> str:
    """One line of text for one row."""
    if isinstance(row.mixer, Opaque):
        return f"{row.mixer.type} at {row.mixer.path}"
    parts = ["no attention" if row.mixer is None else row.mixer.describe()]
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
