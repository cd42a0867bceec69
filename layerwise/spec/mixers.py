"""What mixes tokens in a row: each mixer with its sizes, as plain values."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from layerwise.errors import BadOption
from layerwise.spec.formats import DTYPE_BYTES, Precision, key_bytes
from layerwise.spec.values import LATER


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding: base `theta`, and the scaling that stretches it over long contexts.

    `part` is the share of a head's channels that turn, from the first on.
    """

    theta: float = 10_000.0
    kind: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_context: int = 8192
    part: float = 1.0


@dataclass(frozen=True)
class Attention:
    """Softmax attention. `window` limits how many past tokens are seen; `None` means all of them.

    With `shares`, keys and values are those of that earlier layer, and the layer has no k and v matrices. Queries see
    keys and values as a `cache` of that precision holds them.
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
    cache: Precision = field(default="model", metadata=LATER)

    def __post_init__(self) -> None:
        if self.cache == "int4" and self.head_dim % 2:
            raise BadOption(f"a cache of int4 where heads have {self.head_dim} numbers", expected="an even number",
                            do="keep it in int8")

    def matrices(self, hidden: int) -> dict[str, tuple[int, int]]:
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        own = {} if self.shares is not None else {"k": (key, hidden), "v": (key, hidden)}
        return {"q": (query, hidden), **own, "o": (hidden, query)}

    def vectors(self, hidden: int) -> int:
        """Parameters that are not matrices: biases and query/key norms."""
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim * (self.shares is None)
        bias = (query + 2 * key) * self.qkv_bias + hidden * self.out_bias
        return bias + (1 if self.shares is not None else 2) * self.head_dim * self.qk_norm

    def cache_bytes(self, context: int, dtype: str) -> float:
        """Bytes of cache per token of a sequence of `context` tokens: keys and values, of a window only what it holds.

        0 where another layer's are read; what a wider reader makes a window keep is not counted.
        """
        held = 1.0 if self.window is None else min(1.0, self.window / context)
        return held * self.token_bytes(dtype)

    def token_bytes(self, dtype: str) -> int:
        """Bytes of the keys and values of one token; 0 where another layer's are read."""
        return 0 if self.shares is not None else 2 * self.kv_heads * key_bytes(self.head_dim, self.cache, dtype)

    def describe(self) -> str:
        span = f"window {self.window}" if self.window else "full"
        shared = "" if self.shares is None else f", keys of layer {self.shares}"
        kept = "" if self.cache == "model" else f", cache {self.cache}"
        return f"attention {self.heads}/{self.kv_heads}x{self.head_dim} {span}{shared}{kept}"


@dataclass(frozen=True)
class StateSpace:
    """A selective state space, Mamba-2 (arXiv 2405.21060): a state of `heads` x `head_dim` x `state` numbers that every
    token decays and adds to.

    `groups` of heads share the vectors that write to and read from the state. Before it, a causal convolution looks at
    `conv` tokens. Time steps stay within `shortest` and `longest` (None: no limit).
    """

    heads: int
    head_dim: int
    state: int
    groups: int = 1
    conv: int = 4
    conv_bias: bool = True
    bias: bool = False
    shortest: float = 0.0
    longest: float | None = None

    def __post_init__(self) -> None:
        if self.groups < 1 or self.heads % self.groups or self.conv < 2:
            raise BadOption(f"{self.heads} heads in {self.groups} groups after a convolution of {self.conv}",
                            expected="groups that divide the heads, and a convolution of 2 tokens or more",
                            do="correct the row")

    @property
    def inner(self) -> int:
        """Channels of the state's input and output."""
        return self.heads * self.head_dim

    @property
    def channels(self) -> int:
        """Channels of the convolution: the input, and what writes and reads for every group."""
        return self.inner + 2 * self.groups * self.state

    def matrices(self, hidden: int) -> dict[str, tuple[int, int]]:
        """`in_proj` makes gate, convolved channels and a time step for every head, one above the other."""
        return {"in_proj": (self.inner + self.channels + self.heads, hidden), "out_proj": (hidden, self.inner)}

    def vectors(self, hidden: int) -> int:
        """Parameters that are not matrices: convolution, norm, biases, and decay, skip and step bias of every head."""
        bias = (self.inner + self.channels + self.heads + hidden) * self.bias
        return self.channels * (self.conv + self.conv_bias) + 3 * self.heads + self.inner + bias

    @property
    def kept(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of what a sequence keeps: the last inputs of the convolution, and the state."""
        return (self.conv - 1, self.channels), (self.heads, self.head_dim, self.state)

    def state_bytes(self, dtype: str) -> int:
        """Bytes of what a sequence keeps: the state in float32, the rest in `dtype`."""
        tail, state = self.kept
        return DTYPE_BYTES[dtype] * math.prod(tail) + 4 * math.prod(state)

    def cache_bytes(self, context: int, dtype: str) -> float:
        """Bytes of cache per token of a sequence of `context` tokens, all of which share one state."""
        return self.state_bytes(dtype) / context

    def describe(self) -> str:
        return f"state space {self.heads}x{self.head_dim}x{self.state}"


@dataclass(frozen=True)
class Opaque:
    """A layer of a module that layerwise did not build: run as it is, known by its path and class."""

    path: str
    type: str
    parameters: int
    bytes: int


Mixer = Attention | StateSpace
"""What layerwise builds itself."""
