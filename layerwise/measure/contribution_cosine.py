"""Whether a layer and its two halves amplify or erase what is there: cosines of what they write, token means.

cos(a, h), cos(m, h + a), cos(y - h, h) with h what enters, a and m what attention and feed-forward add
(after any post-norm), y what leaves. Below zero a half erases, above zero it amplifies. Source: arXiv
2505.13898. Cost: one forward pass, shared.

Shapes: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from layerwise.measure.base import Site, TokenMean
from layerwise.measure.seen import Seen


@dataclass(frozen=True)
class ContributionCosine(TokenMean):
    """Columns `attention`, `feed-forward` and `block`: cosine of what each adds with what it is added to."""

    name: ClassVar[str] = "contribution-cosine"
    sites: ClassVar[frozenset[Site]] = frozenset({"input", "output", "attention", "feed_forward"})
    unit: ClassVar[str] = "cosine"
    important: ClassVar[None] = None
    about: ClassVar[str] = "direction of what is written: below zero erases, above zero amplifies"

    @property
    def parts(self) -> Mapping[str, str]:
        return dict.fromkeys(("attention", "feed-forward", "block"), self.unit)

    def values(self, seen: Seen) -> Mapping[str, Tensor]:
        return {
            "attention": seen.cosine("attention", "input"),
            "feed-forward": seen.cosine("feed_forward", "middle"),
            "block": seen.cosine("change", "input"),
        }
