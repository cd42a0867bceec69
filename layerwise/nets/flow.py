"""What all layers share during one pass: positions, masks, rotations and the caches.

Shapes: B batch, T new tokens, P tokens that are wanted, S cached plus new tokens, H heads, D head width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from layerwise.nets.attend import Pages
from layerwise.nets.key_codes import as_kept
from layerwise.nets.softmax import softmax_attention
from layerwise.spec import Attention, Rope

Recurrence = Callable[[Tensor, tuple[Tensor, ...] | None, Tensor | None], tuple[Tensor, tuple[Tensor, ...]]]
"""Inputs [B, T, U], what is kept of the tokens before (None: there are none), and how many tokens of each row are
real (None: all) give outputs [B, T, I] and what is kept after them, tensors [B, ...] that are never changed in place.
"""


class LayerCache:
    """Keys and values of one layer, [B, H, capacity, D]; capacity doubles when it is full."""

    def __init__(self) -> None:
        self.k: Tensor | None = None
        self.v: Tensor | None = None
        self.length = 0

    def append(self, k_BHTD: Tensor, v_BHTD: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new tokens and return all keys and values so far, [B, H, S, D], as views."""
        end = self.length + k_BHTD.shape[2]
        self.k = _room(self.k, k_BHTD, self.length, end)
        self.v = _room(self.v, v_BHTD, self.length, end)
        self.k[:, :, self.length : end] = k_BHTD
        self.v[:, :, self.length : end] = v_BHTD
        self.length = end
        return self.k[:, :, :end], self.v[:, :, :end]

    def copied(self, times: int = 1) -> LayerCache:
        """A cache that goes on by itself, every row `times` times; appending to it copies and never overwrites."""
        twin = LayerCache()
        if self.k is not None and self.v is not None:
            k, v = self.k[:, :, : self.length], self.v[:, :, : self.length]
            twin.k, twin.v = (k, v) if times == 1 else (k.repeat_interleave(times, 0), v.repeat_interleave(times, 0))
            twin.length = self.length
        return twin


@dataclass
class StateCache:
    """What a recurrent layer keeps of the `length` tokens so far, tensors [B, ...]."""

    kept: tuple[Tensor, ...] | None = None
    length: int = 0

    def copied(self, times: int = 1) -> StateCache:
        """A cache that goes on by itself, every row `times` times."""
        if self.kept is None or times == 1:
            return StateCache(self.kept, self.length)
        return StateCache(tuple(tensor.repeat_interleave(times, 0) for tensor in self.kept), self.length)


AnyCache = LayerCache | StateCache


def _room(store: Tensor | None, new: Tensor, used: int, end: int) -> Tensor:
    if store is not None and store.shape[2] >= end:
        return store
    batch, heads, _, width = new.shape
    grown = new.new_empty(batch, heads, max(64, 1 << (end - 1).bit_length()), width)
    if store is not None:
        grown[:, :, :used] = store[:, :, :used]
    return grown


@dataclass
class Flow:
    """Positions [B, T] of the new tokens, validity [B, S] of all tokens (None: no padding), caches by layer.

    `sources` are the layers whose keys and values a later layer reads; the pass keeps those it has seen.
    """

    positions_BT: Tensor
    valid_BS: Tensor | None = None
    caches: dict[int, AnyCache] | None = None
    past: int = 0
    dtype: torch.dtype = torch.float32
    sources: frozenset[int] = frozenset()
    _kept: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    _rotations: dict[tuple[Rope, int], tuple[Tensor, Tensor]] = field(default_factory=dict)
    _masks: dict[int | None, Tensor | None] = field(default_factory=dict)
    _orders: list[tuple[Tensor, Tensor] | None] = field(default_factory=list)

    @property
    def wanted_P(self) -> Tensor | None:
        """Tokens that are read behind the last layer, which may leave others as they come; ascending. None: all."""
        return None

    def cache(self, layer: int) -> LayerCache | None:
        found = None if self.caches is None else self.caches.setdefault(layer, LayerCache())
        return found  # type: ignore[return-value]

    def state(self, layer: int) -> StateCache | None:
        found = None if self.caches is None else self.caches.setdefault(layer, StateCache())
        return found  # type: ignore[return-value]

    def attend(self, a: Attention, layer: int, q_BHTD: Tensor, k_BKTD: Tensor | None = None,
               v_BKTD: Tensor | None = None) -> Tensor:
        """What the new tokens' queries get from the values of all tokens, [B, H, T, D].

        New keys and values join the layer's cache, if any; a layer that has none reads those of the layer it shares.
        """
        if k_BKTD is None or v_BKTD is None:
            assert a.shares is not None
            k_BKSD, v_BKSD = self._kept[a.shares]
        else:
            k_BKSD, v_BKSD = self._extended(layer, as_kept(k_BKTD, a.cache), as_kept(v_BKTD, a.cache))
        return softmax_attention(q_BHTD, k_BKSD, v_BKSD, self.mask(a.window), a)

    def pages(self, a: Attention, layer: int, dtype: torch.dtype) -> Pages | None:
        """Where the layer's keys lie, for functions that attend to them there; None where `attend` is the way."""
        return None

    def _extended(self, layer: int, k_BKTD: Tensor, v_BKTD: Tensor) -> tuple[Tensor, Tensor]:
        cache = self.cache(layer)
        both = (k_BKTD, v_BKTD) if cache is None else cache.append(k_BKTD, v_BKTD)
        if layer in self.sources:
            self._kept[layer] = both
        return both

    def recur(self, layer: int, advance: Recurrence, u_BTU: Tensor) -> Tensor:
        """What a recurrence makes of the new tokens, [B, T, I]; it goes on from the layer's cache, if any.

        Padding is passed by, wherever it stands; its own outputs mean nothing.
        """
        cache, order = self.state(layer), self.order()
        if order is not None:  # real tokens first, in their order
            u_BTU = u_BTU.gather(1, order[0][..., None].expand_as(u_BTU))
        y_BTI, kept = advance(u_BTU, None if cache is None else cache.kept, None if order is None else order[1])
        if cache is not None:
            cache.kept, cache.length = kept, cache.length + u_BTU.shape[1]
        if order is None:
            return y_BTI
        return torch.zeros_like(y_BTI).scatter(1, order[0][..., None].expand_as(y_BTI), y_BTI)

    def order(self) -> tuple[Tensor, Tensor] | None:
        """The places of the new tokens, real ones first [B, T], and how many of each row are real; None: all are."""
        if not self._orders:
            self._orders.append(None if self.valid_BS is None else _real_first(self.valid_BS[:, self.past :]))
        return self._orders[0]

    def provide(self, layer: int, k_BKSD: Tensor, v_BKSD: Tensor) -> None:
        """Keys and values of a layer that this pass does not run, for those that share them."""
        self._kept[layer] = k_BKSD, v_BKSD

    def forked(self) -> Flow:
        """A flow that goes on from here by itself: what later layers leave for one another is its own."""
        return replace(self, _kept=dict(self._kept)) if self.sources else self

    def rotation(self, rope: Rope, width: int) -> tuple[Tensor, Tensor]:
        """Cosines and signed sines [B, 1, T, width], so that rotating is x * cos + roll(x, width / 2) * sin."""
        if (rope, width) not in self._rotations:
            angles_BTh = self.positions_BT[..., None].float() * frequencies(rope, width).to(self.positions_BT.device)
            cos, sin = angles_BTh.cos(), angles_BTh.sin()
            self._rotations[rope, width] = (
                torch.cat([cos, cos], -1)[:, None].to(self.dtype), torch.cat([-sin, sin], -1)[:, None].to(self.dtype))
        return self._rotations[rope, width]

    def mask(self, window: int | None) -> Tensor | None:
        """Which keys each query sees, bool [B or 1, 1, T, S]; None where plain causal order says it all.

        A key is seen when it is real, not later than the query, and less than `window` tokens before it.
        """
        if window not in self._masks:
            self._masks[window] = self._build_mask(window)
        return self._masks[window]

    def _build_mask(self, window: int | None) -> Tensor | None:
        new = self.positions_BT.shape[1]
        total = self.past + new
        narrow = window is not None and window < total
        if self.valid_BS is None and not narrow and (self.past == 0 or new == 1):
            return None
        device = self.positions_BT.device
        query_T1 = torch.arange(self.past, total, device=device)[:, None]
        key_S = torch.arange(total, device=device)
        seen_TS = key_S <= query_T1
        if window is not None and narrow:
            seen_TS &= key_S > query_T1 - window
        if self.valid_BS is None:
            return seen_TS[None, None]
        seen_BTS = seen_TS & self.valid_BS[:, None, :]
        itself_TS = key_S == query_T1  # a padded query sees itself, so that no row of the softmax is empty
        return (seen_BTS | itself_TS)[:, None]


def _real_first(valid_BT: Tensor) -> tuple[Tensor, Tensor] | None:
    if bool(valid_BT.all()):
        return None
    return torch.argsort((~valid_BT).to(torch.uint8), dim=1, stable=True), valid_BT.sum(1)


def frequencies(rope: Rope, width: int) -> Tensor:
    """Inverse frequencies [width / 2] in radians per token; `llama3` follows the Llama 3.1 scaling rule."""
    base = 1.0 / rope.theta ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
    if rope.kind == "default":
        return base
    if rope.kind == "linear":
        return base / rope.factor
    wavelength = 2 * math.pi / base
    turns = rope.original_context / wavelength
    smooth = (turns - rope.low_frequency_factor) / (rope.high_frequency_factor - rope.low_frequency_factor)
    smooth = smooth.clamp(0.0, 1.0)
    return (1 - smooth) * base / rope.factor + smooth * base
