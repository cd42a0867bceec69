"""How far the output moves without a layer: mean of |y' - y| / |y| over rows, y the output, y' with the layer skipped.

Source: the skip effects on the output of arXiv 2505.13898, there as differences of probabilities; the relative change
of vectors needs neither labels nor classes, so that encoders and networks without a head have it too. For a decoder y
is the last hidden state, before the final norm. Cost: layers^2 / 2 layer runs, half of starting over.

Shapes: P positions or rows of the output, C width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from layerwise.measure.base import Needs, Skipping
from layerwise.measure.ending import Ending
from layerwise.measure.scores import Direction


def relative_change(y_PC: Tensor, changed_PC: Tensor) -> float:
    """Mean over rows of |y' - y| / |y|; rows of zeros are left out."""
    y_PC, changed_PC = y_PC.double(), changed_PC.double()
    size_P = y_PC.norm(dim=-1)
    return float(((changed_PC - y_PC).norm(dim=-1) / size_P)[size_P > 0].mean())


@dataclass(frozen=True)
class SkipEffect(Skipping):
    """Relative change of the output with the layer skipped, at `tokens` positions of every row (None: all)."""

    tokens: int | None = 128

    name: ClassVar[str] = "skip-effect"
    unit: ClassVar[str] = "relative"
    important: ClassVar[Direction] = "high"
    about: ClassVar[str] = "how far the output moves when the layer is skipped"
    needs: ClassVar[Needs] = "output"

    def score(self, original: Ending, changed: Ending) -> float:
        return relative_change(original.hidden_PC, changed.hidden_PC)
