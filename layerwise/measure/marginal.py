"""What each edit of a finished plan costs beside all the others: the divergence that undoing it alone would save.

Losses measured one at a time add up only while they are small. In an edited model the same edit may cost more,
because others have disturbed what it works on, or less, because the damage is done already. The marginal of a
layer is KL(original || edited) - KL(original || edited with this layer as it was), back in its place if it was left
out. Cost: layers^2 / 2 layer runs and one pass for each table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.io.pages import trim
from layerwise.measure.ending import Ending, kl
from layerwise.measure.inputs import Inputs
from layerwise.measure.progress import Progress
from layerwise.measure.sweep import Walk
from layerwise.spec import Attention, LayerSpec
from layerwise.stack.decoder import DecoderStack

TABLES = ("embedding", "head")


@dataclass(frozen=True)
class Marginals:
    """`kl` of the edited model in nats per token, and what undoing each edit saves of it, by layer or table."""

    kl: float
    saved: dict[int | str, float]


class Row(nn.Module):
    """Several blocks in the place of one, in their order."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x_BTC: Tensor, *shared: object) -> Tensor:
        for block in self.blocks:
            x_BTC = block(x_BTC, *shared)
        return x_BTC


@torch.inference_mode()
def divergence(before: DecoderStack, after: DecoderStack, data: Any, *, tokens: int | None = 256,
               seed: int = 0) -> float:
    """KL(before || after) in nats per token, at `tokens` positions of every row of `data` (None: all)."""
    original, walk = _side_by_side(before, after, data, tokens, seed)
    found = kl(original, walk.originals[0])
    del original, walk
    trim()
    return found


@torch.inference_mode()
def marginals(before: DecoderStack, after: DecoderStack, kept: Sequence[int], data: Any, *,
              tokens: int | None = 256, seed: int = 0, progress: bool = False) -> Marginals:
    """Marginals of `after`, whose layers were the layers `kept` of `before`, at least one.

    Output is compared as in `divergence`. None is known of a layer that reads the keys of one that is gone.
    """
    read = frozenset(kept.index(source) for source in before.spec.sources if source in kept)
    original, walk = _side_by_side(before, after, data, tokens, seed, read)
    now = kl(original, walk.originals.pop())  # which frees its logits
    saved: dict[int | str, float] = {}
    with Progress("undoing edits one by one", len(after), progress) as bar:
        for layer in range(len(after)):
            for source in _standing_at(layer, kept, len(before)):
                undone = _undone(before, after, source, layer, kept)
                if undone is not None:
                    saved[source] = now - kl(original, walk.ending(0, undone, layer))
            walk.advance()
            trim()
            bar.step()
    for table in TABLES:
        if getattr(after.spec, f"{table}_format") != getattr(before.spec, f"{table}_format"):
            restored = after.with_tables(after.spec, **{table: getattr(before.decoder, table)})
            saved[table] = now - kl(original, walk.ending(0, restored, table))
    return Marginals(now, saved)


def _side_by_side(before: DecoderStack, after: DecoderStack, data: Any, tokens: int | None, seed: int,
                  read: frozenset[int] = frozenset()) -> tuple[Ending, Walk]:
    """The end of the original, and the walk of the other at its start; keys of the layers in `read` are kept."""
    original = Walk(before, Inputs(before, data), [tokens], seed).originals[0]
    trim()
    return original, Walk(after, Inputs(after, data), [tokens], seed, read)


def _standing_at(layer: int, kept: Sequence[int], layers: int) -> range:
    """The layers that can be undone at a place: its own, and those left out before it; after it too at the last."""
    return range(kept[layer - 1] + 1 if layer else 0, layers if layer == len(kept) - 1 else kept[layer] + 1)


def _undone(before: DecoderStack, after: DecoderStack, source: int, layer: int, kept: Sequence[int]
            ) -> nn.Module | None:
    """What to put at `layer` of the edited model so that `source` is as it was; None if it is so, or cannot be."""
    row = _as_it_was(before.spec.rows[source], kept)
    if row is None or (source == kept[layer] and row == after.spec.rows[layer]):
        return None
    block = before.block(source)
    if row != before.spec.rows[source]:
        block = block.with_mixer(row.mixer)  # type: ignore[operator]
    if source == kept[layer]:
        return block
    return Row(block, after.block(layer)) if source < kept[layer] else Row(after.block(layer), block)


def _as_it_was(row: LayerSpec, kept: Sequence[int]) -> LayerSpec | None:
    """The row with the layer whose keys it reads, if any, where that is now; None where it is gone."""
    if not isinstance(row.mixer, Attention) or row.mixer.shares is None:
        return row
    source = row.mixer.shares
    return replace(row, mixer=replace(row.mixer, shares=kept.index(source))) if source in kept else None
