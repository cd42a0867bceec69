"""First two moments of the states that leave every layer, class by class, and how far classes lie apart.

    share  trace of the variance of class means (weighted by their items) / trace of the whole variance

0 where all classes have one mean, 1 where all items of a class are one point. An item's state is the mean over its
positions. Moments of parts of the data add up to those of the whole. Cost: one forward pass.

Shapes: B items, K classes, C width of a layer, which may differ from layer to layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from layerwise.errors import BadData, BadModel
from layerwise.measure.inputs import Inputs, try_batch
from layerwise.measure.module_walk import check_labels
from layerwise.measure.seen import Vectors
from layerwise.stack.base import Stack


@dataclass(frozen=True)
class ClassMoments:
    """Items by class [K], and for every layer the sums of states and of their squares, [K, C], all float64."""

    count_K: Tensor
    sums: tuple[Tensor, ...]
    squares: tuple[Tensor, ...]

    def __add__(self, other: ClassMoments) -> ClassMoments:
        """Those of both. Raises BadData for another number of layers, of other widths, or of classes."""
        mine, theirs = ([part.shape for part in moments.sums] for moments in (self, other))
        if mine != theirs:
            raise BadData(f"moments of shapes {list(map(list, mine))} and {list(map(list, theirs))}",
                          expected="two parts of one measurement", do="use one model and the same `classes`")
        return ClassMoments(self.count_K + other.count_K, *(
            tuple(a + b for a, b in zip(*pair, strict=True))
            for pair in ((self.sums, other.sums), (self.squares, other.squares))))

    def mean(self, layer: int) -> Tensor:
        """Mean state of every class after a layer, [K, C]; nan for a class without items."""
        return self.sums[layer] / self.count_K[:, None]

    def variance(self, layer: int) -> Tensor:
        """Variance along every coordinate within each class, [K, C]."""
        return (self.squares[layer] / self.count_K[:, None] - self.mean(layer) ** 2).clamp(min=0)

    @property
    def between_L(self) -> Tensor:
        """Share of the variance that lies between classes, by layer; nan where nothing varies."""
        weight_K1 = (self.count_K / self.count_K.sum())[:, None]
        shares = []
        for layer in range(len(self.sums)):
            mean_KC = self.mean(layer).nan_to_num()
            whole_C = (weight_K1 * mean_KC).sum(0)
            between = (weight_K1 * (mean_KC - whole_C) ** 2).sum()
            shares.append(between / (between + (weight_K1 * self.variance(layer).nan_to_num()).sum()))
        return torch.stack(shares)


@torch.inference_mode()
def class_moments(stack: Stack, data: Any, classes: int | None = None) -> ClassMoments:
    """One pass of a module over labelled `data`; `classes` is needed where a part of the data may lack the last ones.

    Raises BadData for data without labels or of one class, BadModel where a state is NaN or infinite.
    """
    inputs = Inputs(stack, data)
    check_labels(inputs, f"class-wise moments of {stack.name}")
    labels = [item.labels_B for item in inputs if item.labels_B is not None]
    number = classes or int(max(label_B.max() for label_B in labels)) + 1
    count_K = torch.zeros(number, dtype=torch.float64)
    sums: list[Tensor] = []
    squares: list[Tensor] = []
    for index, (item, label_B) in enumerate(zip(inputs, labels, strict=True)):
        if index == 0:
            try_batch(stack, item)
        with stack.capture("output") as seen:
            stack(*item.args, **item.kwargs)
        found = [Vectors(seen[layer, "output"]).x_BTC.double().mean(1).cpu() for layer in range(len(stack))]
        if not sums:
            sums = [torch.zeros(number, x_BC.shape[1], dtype=torch.float64) for x_BC in found]
            squares = [torch.zeros_like(total) for total in sums]
        count_K += torch.bincount(label_B.cpu(), minlength=number)
        for layer, x_BC in enumerate(found):
            if not bool(x_BC.isfinite().all()):
                raise BadModel(f"activations after layer {layer} are NaN or infinite, first in batch {index}",
                               expected="finite activations", do="check the data and the weights there")
            sums[layer].index_add_(0, label_B.cpu(), x_BC)
            squares[layer].index_add_(0, label_B.cpu(), x_BC**2)
    return ClassMoments(count_K, tuple(sums), tuple(squares))
