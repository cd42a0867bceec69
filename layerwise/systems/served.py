"""Comparing what an engine serves with what plain passes give."""

from __future__ import annotations

from collections.abc import Sequence


def same(a: Sequence[Sequence[int]], b: Sequence[Sequence[int]]) -> float:
    """The share of tokens that are equal, answer by answer and place by place; answers are as long as one another."""
    pairs = [(left, right) for one, other in zip(a, b, strict=True) for left, right in zip(one, other, strict=True)]
    return round(sum(left == right for left, right in pairs) / len(pairs), 3)
