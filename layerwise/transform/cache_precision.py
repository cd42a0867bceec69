"""Let a layer's cache hold keys and values as integers; queries then see them so, in prefill and decoding alike."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, cast, get_args

from torch import nn

from layerwise.errors import BadOption
from layerwise.nets.decoder import Block
from layerwise.spec import Attention, LayerSpec, Precision
from layerwise.transform.base import Stats, Transform


@dataclass(frozen=True)
class CachePrecision(Transform):
    """Keys and values in `precision`: "int8", "int4", or "model" for the dtype of the model (`nets/key_codes.py`)."""

    name: ClassVar[str] = "cache-precision"
    keeps_inputs: ClassVar[bool] = True
    precision: Precision = "int8"

    def __post_init__(self) -> None:
        if self.precision not in get_args(Precision):
            raise BadOption(f"precision={self.precision!r}", expected=f"one of {', '.join(get_args(Precision))}",
                            do="choose one of these")

    def edit(self, row: LayerSpec, hidden: int) -> LayerSpec:
        """The row with the other cache. Raises BadOption for a row that has none, or heads that cannot be so."""
        if not isinstance(row.mixer, Attention) or row.mixer.shares is not None:
            raise BadOption("the cache of a layer without keys of its own", expected="a layer with softmax attention",
                            do="choose another layer")
        return replace(row, mixer=replace(row.mixer, cache=self.precision))

    def apply(self, block: nn.Module, row: LayerSpec, stats: Stats | None = None) -> Block:
        """The block with the same weights, its attention described by the edited row."""
        edited = self.edit(row, 0).mixer
        assert isinstance(edited, Attention)
        return cast(Block, block).with_mixer(edited)
