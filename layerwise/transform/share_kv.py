"""Let a layer read the keys and values of an earlier layer instead of making its own (arXiv 2410.18517, 2406.09297)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, cast

from torch import nn

from layerwise.errors import BadOption
from layerwise.nets.decoder import Block
from layerwise.spec import Attention, LayerSpec, StackSpec
from layerwise.transform.base import Stats, Transform

OWN = ("k", "v", "k_norm")


def sources(spec: StackSpec, layer: int) -> list[int]:
    """The layers whose keys and values `layer` could read instead of its own, the nearest first.

    They come before it, have keys of their own of the same heads and rotation, and look back at least as far.
    """
    mixer = spec.rows[layer].mixer
    if not isinstance(mixer, Attention) or mixer.shares is not None:
        return []
    return [other for other in reversed(range(layer)) if _readable(spec.rows[other].mixer, mixer)]


def _readable(source: object, reader: Attention) -> bool:
    if not isinstance(source, Attention) or source.shares is not None:
        return False
    if (source.kv_heads, source.head_dim, source.rope) != (reader.kv_heads, reader.head_dim, reader.rope):
        return False
    return source.window is None or (reader.window is not None and source.window >= reader.window)


@dataclass(frozen=True)
class ShareKV(Transform):
    """Give up a layer's keys and values for those of the layer `source`, in prefill and decoding alike.

    The layer keeps its queries and needs no cache. That `source` is an earlier layer with keys of its own and
    the same heads is checked where the row joins its table.
    """

    name: ClassVar[str] = "share-kv"
    source: int = 0

    def __post_init__(self) -> None:
        if self.source < 0:
            raise BadOption(f"source={self.source}", expected="a layer, 0 or more", do="count layers from 0")

    def edit(self, row: LayerSpec, hidden: int) -> LayerSpec:
        """The row without keys and values of its own. Raises BadOption for a row without attention."""
        if not isinstance(row.mixer, Attention):
            raise BadOption(f"sharing keys in a layer without {'known ' if row.mixer else ''}attention",
                            expected="a layer with softmax attention", do="choose another layer")
        formats = {name: packed for name, packed in row.formats.items() if name not in OWN}
        ranks = {name: rank for name, rank in row.ranks.items() if name not in OWN}
        return replace(row, mixer=replace(row.mixer, shares=self.source), formats=formats, ranks=ranks)

    def apply(self, block: nn.Module, row: LayerSpec, stats: Stats | None = None) -> Block:
        """The block without its key and value matrices, sharing the rest."""
        block = cast(Block, block)
        edited = self.edit(row, 0).mixer
        assert isinstance(edited, Attention)
        new = block.with_mixer(edited)
        body = new.branch("q").body
        for name in OWN:
            body._modules.pop(name, None)
        return new
