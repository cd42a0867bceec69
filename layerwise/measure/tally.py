"""Running means: a sum and a count for every layer, in float64."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


@dataclass
class Means:
    """Sum and count of the values seen so far, float64 [L], by part."""

    sums: dict[str, NDArray[np.float64]]
    counts: dict[str, NDArray[np.float64]]

    @classmethod
    def empty(cls, parts: Iterable[str], layers: int) -> Means:
        parts = list(parts)
        return cls({part: np.zeros(layers) for part in parts}, {part: np.zeros(layers) for part in parts})

    def add(self, part: str, layer: int, values_BT: Tensor, mask_BT: Tensor | None = None) -> None:
        """Add the values at real tokens; nan values are left out."""
        if mask_BT is not None:
            values_BT = values_BT[mask_BT]
        self.sums[part][layer] += float(values_BT.double().nansum())
        self.counts[part][layer] += int((values_BT == values_BT).sum())

    def mean(self, part: str) -> tuple[float, ...]:
        """Mean of every layer, nan where nothing was seen."""
        pairs = zip(self.sums[part].tolist(), self.counts[part].tolist(), strict=True)
        return tuple(total / count if count else math.nan for total, count in pairs)

    def __add__(self, other: Means) -> Means:
        return Means({part: self.sums[part] + other.sums[part] for part in self.sums},
                     {part: self.counts[part] + other.counts[part] for part in self.counts})
