"""How much the loss grows without a layer: mean loss with the layer skipped, minus the original's.

The loss is that of the next token, for a module that is no decoder that of the label.

Source: the perplexity ranking of depth pruning (arXiv 2411.15558 and others), as a difference of losses in
nats; exp(difference) is the ratio of perplexities. Cost: layers^2 / 2 layer runs, half of starting over.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from layerwise.measure.base import Needs, Skipping
from layerwise.measure.ending import Ending
from layerwise.measure.scores import Direction


@dataclass(frozen=True)
class LeaveOneOut(Skipping):
    """Increase of the mean loss at `tokens` positions of every row (None: all) with the layer skipped."""

    tokens: int | None = 128

    name: ClassVar[str] = "leave-one-out"
    unit: ClassVar[str] = "nats/token"
    important: ClassVar[Direction] = "high"
    about: ClassVar[str] = "how much the loss grows when the layer is skipped"
    needs: ClassVar[Needs] = "labels"

    def score(self, original: Ending, changed: Ending) -> float:
        return changed.loss - original.loss
