"""Take a layer out, or only its attention or its feed-forward half."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, Literal, cast, get_args

from torch import nn

from layerwise.errors import BadOption
from layerwise.nets.decoder import MATRICES, Block
from layerwise.spec import LayerSpec, Opaque
from layerwise.transform.base import Stats, Transform

Part = Literal["layer", "attention", "feed_forward"]


@dataclass(frozen=True)
class Drop(Transform):
    """Drop `part` of a layer: the residual stream then passes it by. A layer without halves is gone."""

    name: ClassVar[str] = "drop"
    part: Part = "layer"

    def __post_init__(self) -> None:
        if self.part not in get_args(Part):
            raise BadOption(f"part={self.part!r}", expected=f"one of {get_args(Part)}",
                            do="choose one of them")

    def edit(self, row: LayerSpec, hidden: int) -> LayerSpec | None:
        """The row without the part; None for a whole layer. Raises BadOption for half of an opaque layer."""
        if self.part == "layer":
            return None
        if isinstance(row.mixer, Opaque):
            raise BadOption(f"dropping the {self.part} of {row.mixer.path}, which layerwise did not build",
                            expected="a layer of a decoder language model", do="drop the whole layer")
        formats = {name: packed for name, packed in row.formats.items() if MATRICES[name] != self.part}
        ranks = {name: rank for name, rank in row.ranks.items() if MATRICES[name] != self.part}
        gone = "mixer" if self.part == "attention" else "feed_forward"
        row = dataclasses.replace(row, **{gone: None}, formats=formats, ranks=ranks)  # type: ignore[arg-type]
        return row if row.mixer or row.feed_forward else None

    def apply(self, block: nn.Module, row: LayerSpec, stats: Stats | None = None) -> nn.Module | None:
        """The block without the part, sharing the rest; None for a whole layer."""
        if self.part == "layer":
            return None
        block = cast(Block, block).without(self.part)
        return block if block.attention is not None or block.feed_forward is not None else None
