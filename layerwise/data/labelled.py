"""Inputs of any shape with labels, in memory: what small classifiers train on.

Shapes: N items, B of a batch; whatever follows N is the input's own shape.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from layerwise.data.batch import slices
from layerwise.data.images import ImageData
from layerwise.errors import BadData


@dataclass(frozen=True)
class Labelled:
    """`x_N` floating, `labels_N` int64 below `classes`. Raises BadData where their lengths differ."""

    x_N: Tensor
    labels_N: Tensor
    classes: int
    name: str

    def __post_init__(self) -> None:
        if not len(self.x_N) or len(self.x_N) != len(self.labels_N):
            raise BadData(
                f"{len(self.x_N)} inputs and {len(self.labels_N)} labels in {self.name}",
                expected="at least one input, and a label for each",
                do="check where inputs and labels come from",
            )

    def __len__(self) -> int:
        return len(self.x_N)

    def __iter__(self) -> Iterator[Tensor]:
        """Inputs in order, 256 at a time."""
        return (x_B for x_B, _ in self.batches())

    def batches(self, size: int = 256) -> Iterator[tuple[Tensor, Tensor]]:
        """(inputs, labels) in order, `size` at a time."""
        for rows in slices(len(self), size):
            yield self.x_N[rows], self.labels_N[rows]

    def take(self, count: int, seed: int | None = None) -> Labelled:
        """The first `count`, or that many drawn with `seed`, in order."""
        if seed is None:
            return self.pick(torch.arange(min(count, len(self))))
        order_N = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        return self.pick(order_N[:count].sort().values)

    def pick(self, index_M: Tensor) -> Labelled:
        """The items at `index_M`, in that order."""
        return replace(self, x_N=self.x_N[index_M], labels_N=self.labels_N[index_M])


def loaded(images: ImageData) -> Labelled:
    """Decoded and normalised images in memory, [N, C, H, W]. Raises BadData where there are no labels."""
    labels_N = images.labels()
    pixels_N = torch.cat([batch.pixels_BCHW for batch in images.batches(256)])
    return Labelled(pixels_N, labels_N, len(images.classes) or int(labels_N.max()) + 1, images.name)
