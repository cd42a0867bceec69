"""One number for how many layers a model uses: where along the depth a curve crosses its threshold.

Depths count layers from 0; None where there is no crossing. The share is (depth + 1) / layers. Source: arXiv
2512.14064 for the cosine, divergence and overlap criteria with their thresholds; `last_above` is the same idea
for curves that say how much a depth still matters (skip effects, erasure, integrated gradients) and is ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def cosine_depth(curves: Sequence[Sequence[float]]) -> int | None:
    """The last layer at which the mean of the cosine curves turns from below zero to above."""
    mean = [sum(values) / len(values) for values in zip(*curves, strict=True)]
    turns = [layer for layer in range(len(mean) - 1) if mean[layer] < 0 <= mean[layer + 1]]
    return turns[-1] if turns else None


def kl_depth(kl: Sequence[float], share: float = 0.5, rank: int = 0) -> int | None:
    """The first layer whose lens divergence is below `share` of the largest (after leaving out `rank` larger)."""
    largest = sorted(kl, reverse=True)[rank]
    return next((layer for layer, value in enumerate(kl) if value < share * largest), None)


def overlap_depth(overlap: Sequence[float], least: float = 0.3) -> int | None:
    """The first layer whose lens shares more than `least` of the final top five."""
    return next((layer for layer, value in enumerate(overlap) if value > least), None)


def last_above(values: Sequence[float], share: float = 0.5, first: int = 0) -> int | None:
    """The last layer whose value is above `share` of the largest, from layer `first` on."""
    largest = max(values[first:])
    above = [layer for layer, value in enumerate(values) if layer >= first and value > share * largest]
    return above[-1] if above else None


def shares(found: Mapping[str, int | None], layers: int) -> dict[str, float | None]:
    """(depth + 1) / layers, as published."""
    return {name: None if depth is None else round((depth + 1) / layers, 3) for name, depth in found.items()}
