"""What each edit of a finished plan costs beside all the others: the divergence that undoing it alone would save.

Losses measured one at a time add up only while they are small. In an edited model the same edit may cost more,
because others have disturbed what it works on, or less, because the damage is done already. The marginal of a
layer is KL(original || edited) - KL(original || edited with this layer as it was).
Cost: layers^2 / 2 layer runs and one pass for each table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

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


@torch.inference_mode()
def divergence(before: DecoderStack, after: DecoderStack, data: Any, *, tokens: int | None = 256,
               seed: int = 0) -> float:
    """KL(before || after) in nats per token, at `tokens` positions of every row of `data` (None: all)."""
    original, walk = _side_by_side(before, after, data, tokens, seed)
    return kl(original, walk.originals[0])


@torch.inference_mode()
def marginals(before: DecoderStack, after: DecoderStack, kept: Sequence[int], data: Any, *,
              tokens: int | None = 256, seed: int = 0, progress: bool = False) -> Marginals:
    """Marginals of `after`, whose layers were the layers `kept` of `before`; of dropped layers none is known.

    Output is compared as in `divergence`.
    """
    original, walk = _side_by_side(before, after, data, tokens, seed)
    now = kl(original, walk.originals[0])
    saved: dict[int | str, float] = {}
    with Progress("undoing edits one by one", len(after), progress) as bar:
        for layer, source in enumerate(kept):
            row = _as_it_was(before.spec.rows[source], kept)
            if row is not None and row != after.spec.rows[layer]:
                saved[source] = now - kl(original, walk.ending(0, _block(before, source, row), layer))
            walk.advance()
            bar.step()
    for table in TABLES:
        if getattr(after.spec, f"{table}_format") != getattr(before.spec, f"{table}_format"):
            restored = after.with_tables(after.spec, **{table: getattr(before.decoder, table)})
            saved[table] = now - kl(original, walk.ending(0, restored, table))
    return Marginals(now, saved)


def _side_by_side(before: DecoderStack, after: DecoderStack, data: Any, tokens: int | None,
                  seed: int) -> tuple[Ending, Walk]:
    original = Walk(before, Inputs(before, data), [tokens], seed).originals[0]
    return original, Walk(after, Inputs(after, data), [tokens], seed)


def _as_it_was(row: LayerSpec, kept: Sequence[int]) -> LayerSpec | None:
    """The row with the layer whose keys it reads, if any, where that is now; None where it is gone."""
    if not isinstance(row.mixer, Attention) or row.mixer.shares is None:
        return row
    source = row.mixer.shares
    return replace(row, mixer=replace(row.mixer, shares=kept.index(source))) if source in kept else None


def _block(before: DecoderStack, layer: int, row: LayerSpec) -> nn.Module:
    block = before.block(layer)
    return block.with_mixer(row.mixer) if row != before.spec.rows[layer] else block  # type: ignore[operator]
