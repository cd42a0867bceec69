"""What mixes tokens in a row: each mixer with its sizes, as plain values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


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
class Opaque:
    """A layer of a module that layerwise did not build: run as it is, known by its path and class."""

    path: str
    type: str
    parameters: int
    bytes: int
