"""What one batch shows at one layer, with per-token products that are computed once and shared.

Shapes: B rows, T tokens, C hidden width, P sampled positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

Name = Literal["input", "output", "attention", "feed_forward", "middle", "change", "gradient"]


def inner(a: Tensor, b: Tensor) -> Tensor:
    """Inner products over the last axis, in float64."""
    products: Tensor = torch.linalg.vecdot(a, b)
    return products.double()


class Vectors:
    """One vector per token. Whatever a layer's tensor looks like, it is seen as [B, T, C] in float32 or more.

    [B, C] counts as one token a row, [B, C, ...] with more than three axes as one token for each place.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    @cached_property
    def x_BTC(self) -> Tensor:
        x = self.tensor
        if x.dim() == 2:
            x = x[:, None]
        elif x.dim() > 3:
            x = x.flatten(2).transpose(1, 2)
        return x.to(torch.promote_types(x.dtype, torch.float32))

    @cached_property
    def squares_BT(self) -> Tensor:
        return inner(self.x_BTC, self.x_BTC)


def fitting(mask_BT: Tensor | None, vectors: Vectors) -> Tensor | None:
    """The mask, where there is a token for each of its entries."""
    if mask_BT is None or vectors.x_BTC.shape[:2] != mask_BT.shape:
        return None
    return mask_BT.to(vectors.x_BTC.device)


class Reading:
    """What the model would say at sampled positions: log-probabilities [P, V] in float32."""

    def __init__(self, logits_PV: Tensor) -> None:
        self.log_p_PV = torch.log_softmax(logits_PV.float(), -1)
        self._top: dict[int, Tensor] = {}

    @cached_property
    def p_PV(self) -> Tensor:
        return self.log_p_PV.exp()

    def top(self, k: int) -> Tensor:
        """The k most likely tokens, [P, k]."""
        if k not in self._top:
            self._top[k] = self.log_p_PV.topk(k).indices
        return self._top[k]


class Seen:
    """The tensors of one batch at one layer. `mask_BT` is True at real tokens, None where all are.

    Beside the captured sites, "middle" is input + attention (what enters the feed-forward half) and
    "change" is output - input. Asking for a site that the instrument did not declare raises KeyError.
    For lens instruments `lens` is the reading at the layer's input and `final` the model's own.
    """

    def __init__(self, sites: Mapping[str, Vectors], mask_BT: Tensor | None = None,
                 earlier: Sequence[Vectors] = (), lens: tuple[Reading, Reading] | None = None) -> None:
        self._vectors, self.mask_BT = dict(sites), mask_BT
        self._earlier, self._lens = earlier, lens
        self._dots: dict[tuple[int, int], Tensor] = {}

    def __getitem__(self, name: Name) -> Tensor:
        """The vectors called `name`, [B, T, C]."""
        return self._named(name).x_BTC

    def square(self, name: Name) -> Tensor:
        """Squared length of every token's vector, [B, T] float64."""
        return self._named(name).squares_BT

    def dot(self, a: Name, b: Name, back: int = 0) -> Tensor:
        """Inner product per token, [B, T] float64; nan where the two differ in shape.

        With `back`, `a` must be "input" and is taken that many layers earlier.
        """
        left, right = self._at(a, back), self._named(b)
        key = id(left), id(right)
        if key not in self._dots:
            self._dots[key] = _dot(left, right)
        return self._dots[key]

    def cosine(self, a: Name, b: Name, back: int = 0) -> Tensor:
        """Cosine per token in [-1, 1], [B, T] float64; nan where a vector is zero or the shapes differ."""
        dot_BT, left = self.dot(a, b, back), self._at(a, back)
        if left.x_BTC.shape != self[b].shape:
            return dot_BT
        return (dot_BT / (left.squares_BT * self.square(b)).sqrt()).clamp(-1, 1)

    @property
    def lens(self) -> Reading:
        assert self._lens is not None
        return self._lens[0]

    @property
    def final(self) -> Reading:
        assert self._lens is not None
        return self._lens[1]

    def _at(self, name: Name, back: int) -> Vectors:
        assert back == 0 or name == "input"
        return self._earlier[-back] if back else self._named(name)

    def _named(self, name: Name) -> Vectors:
        if name not in self._vectors and name == "middle":
            self._vectors[name] = Vectors(self["input"] + self["attention"])
        elif name not in self._vectors and name == "change":
            self._vectors[name] = Vectors(_difference(self["output"], self["input"]))
        return self._vectors[name]


def _dot(a: Vectors, b: Vectors) -> Tensor:
    if a.x_BTC.shape != b.x_BTC.shape:
        return torch.full(b.x_BTC.shape[:2], torch.nan, dtype=torch.float64, device=b.x_BTC.device)
    return a.squares_BT if a is b else inner(a.x_BTC, b.x_BTC)


def _difference(y_BTC: Tensor, x_BTC: Tensor) -> Tensor:
    return y_BTC - x_BTC if y_BTC.shape == x_BTC.shape else torch.full_like(y_BTC, torch.nan)
