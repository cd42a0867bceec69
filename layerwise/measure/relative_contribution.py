"""How much a layer and its two halves write, against what is already there: ratios of lengths, token means.

|a| / |h|, |m| / |h + a|, |y - h| / |h| with h what enters, a and m what attention and feed-forward add
(after any post-norm), y what leaves. Source: arXiv 2505.13898; lengths are clamped at 1e-6 as there.
Cost: one forward pass, shared.

Shapes: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from layerwise.measure.base import Site, TokenMean
from layerwise.measure.scores import Direction
from layerwise.measure.seen import Seen

SMALLEST = 1e-6


def contribution(added_BT: Tensor, present_BT: Tensor) -> Tensor:
    """Ratio of lengths, from squared lengths."""
    return added_BT.sqrt() / present_BT.sqrt().clamp(min=SMALLEST)


@dataclass(frozen=True)
class RelativeContribution(TokenMean):
    """Columns `attention`, `feed-forward` and `block`: what each adds relative to what it is added to."""

    name: ClassVar[str] = "relative-contribution"
    sites: ClassVar[frozenset[Site]] = frozenset({"input", "output", "attention", "feed_forward"})
    unit: ClassVar[str] = "ratio"
    important: ClassVar[Direction] = "high"
    about: ClassVar[str] = "length of what is written relative to the residual stream it is added to"

    @property
    def parts(self) -> Mapping[str, str]:
        return dict.fromkeys(("attention", "feed-forward", "block"), self.unit)

    def values(self, seen: Seen) -> Mapping[str, Tensor]:
        return {
            "attention": contribution(seen.square("attention"), seen.square("input")),
            "feed-forward": contribution(seen.square("feed_forward"), seen.square("middle")),
            "block": contribution(seen.square("change"), seen.square("input")),
        }
