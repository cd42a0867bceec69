"""What a transform is: a row edit that needs no tensors, and the weight edit that makes it true."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor, nn

from layerwise.spec import LayerSpec

Stats = Mapping[str, Tensor]
"""Per-matrix statistics of calibration inputs, by matrix name: the Gram matrix sum(x x^T), [inputs, inputs]."""


class Transform(ABC):
    """Base of every transform; subclasses are frozen dataclasses whose fields are absolute targets.

    Because parameters are targets, editing twice equals editing once. `edit` is pure. `apply` returns
    new weights, shares what it does not change, and leaves its input alone.
    """

    name: ClassVar[str]
    needs: ClassVar[frozenset[str]] = frozenset()
    """Statistics without which `apply` cannot work: empty, or {"gram"}."""
    wants: ClassVar[frozenset[str]] = frozenset()
    """Statistics that `apply` uses where they are at hand, and does without where they are not."""
    keeps_inputs: ClassVar[bool] = False
    """Whether what enters each matrix stays nearly as it was, so that the next edit may read the same statistics."""

    def turns_values(self) -> bool:
        """Whether values come out otherwise than a layer takes them to be that shares them, though the row is."""
        return False

    @abstractmethod
    def edit(self, row: LayerSpec, hidden: int) -> LayerSpec | None:
        """The row after the edit, or None where the layer is gone. Raises BadOption where it cannot be."""

    @abstractmethod
    def apply(self, block: nn.Module, row: LayerSpec, stats: Stats | None = None) -> nn.Module | None:
        """A new block for `block`, whose row before the edit is `row`; None where the layer is gone."""
