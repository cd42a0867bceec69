"""Dividing whole units, such as tokens of a cache, among layers: a floor for each, the rest in proportion to scores.

Shapes: plain lists with one number a layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from layerwise.errors import BadBudget


def floor_plus_proportional(scores: Sequence[float], total: int, floor: int, cap: int) -> list[int]:
    """Whole numbers from `floor` to `cap` that add up to `total`.

    Everyone gets the floor and a share of the rest in proportion to its score (arXiv 2412.09036, equation 6). What a
    cap cuts off is divided among the others in the same way. Fractions are rounded by largest remainder, of equal
    ones the earlier first. With all scores zero, shares are equal. Raises BadBudget where floor and cap leave no way
    to the total, or a score is negative or not finite.
    """
    count = len(scores)
    if not count * floor <= total <= count * cap or floor < 0:
        raise BadBudget(f"a total of {total} for {count} layers", expected=f"between {count * floor} and {count * cap},"
                        f" that is {floor} to {cap} each", do="change the total, the floor or the cap")
    if not all(0 <= score < math.inf for score in scores):
        raise BadBudget(f"scores {[*scores]}", expected="finite numbers that are not negative",
                        do="leave out layers without a score")
    return _rounded(_shares(scores, total - count * floor, cap - floor), total - count * floor, cap - floor, floor)


def _shares(scores: Sequence[float], total: int, cap: int) -> list[float]:
    """Shares in proportion to the scores, none above the cap, that add up to the total."""
    capped: set[int] = set()
    while True:
        free = [layer for layer in range(len(scores)) if layer not in capped]
        left, weight = total - cap * len(capped), math.fsum(scores[layer] for layer in free)
        shares = [float(cap)] * len(scores)
        for layer in free:
            shares[layer] = left * scores[layer] / weight if weight else left / len(free)
        over = {layer for layer in free if shares[layer] > cap}
        if not over:
            return shares
        capped |= over


def _rounded(shares: Sequence[float], total: int, cap: int, floor: int) -> list[int]:
    """Whole shares by largest remainder, the floor added."""
    whole = [min(math.floor(share), cap) for share in shares]
    order = sorted(range(len(shares)), key=lambda layer: (whole[layer] - shares[layer], layer))
    while missing := total - sum(whole):  # more than one round only where float shares fell just below whole numbers
        for layer in [layer for layer in order if whole[layer] < cap][:missing]:
            whole[layer] += 1
    return [floor + share for share in whole]
