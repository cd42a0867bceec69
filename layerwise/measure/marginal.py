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

from layerwise.measure.ending import kl
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


class Undoing:
    """An edited model beside the original, before any edit is undone: `kl`, its divergence in nats per token.

    The layers of `after` were the layers `kept` of `before`. Output is compared at `tokens` positions of every row
    of `data` (None: all).
    """

    @torch.inference_mode()
    def __init__(self, before: DecoderStack, after: DecoderStack, kept: Sequence[int], data: Any, *,
                 tokens: int | None = 256, seed: int = 0) -> None:
        self.before, self.after, self.kept = before, after, kept
        self._original = Walk(before, Inputs(before, data), [tokens], seed).originals[0]
        self._walk = Walk(after, Inputs(after, data), [tokens], seed)
        self.kl = kl(self._original, self._walk.originals[0])

    @torch.inference_mode()
    def marginals(self, progress: bool = False) -> Marginals:
        """Undo the edits one by one, layer by layer and then the tables; of dropped layers none is known. Once."""
        before, after, walk = self.before, self.after, self._walk
        saved: dict[int | str, float] = {}
        with Progress("undoing edits one by one", len(after), progress) as bar:
            for layer, source in enumerate(self.kept):
                row = _as_it_was(before.spec.rows[source], self.kept)
                if row is not None and row != after.spec.rows[layer]:
                    saved[source] = self._saved(_block(before, source, row), layer)
                walk.advance()
                bar.step()
        for table in TABLES:
            if getattr(after.spec, f"{table}_format") != getattr(before.spec, f"{table}_format"):
                restored = after.with_tables(after.spec, **{table: getattr(before.decoder, table)})
                saved[table] = self._saved(restored, table)
        return Marginals(self.kl, saved)

    def _saved(self, alternative: nn.Module | DecoderStack, place: int | str) -> float:
        return self.kl - kl(self._original, self._walk.ending(0, alternative, place))


def _as_it_was(row: LayerSpec, kept: Sequence[int]) -> LayerSpec | None:
    """The row with the layer whose keys it reads, if any, where that is now; None where it is gone."""
    if not isinstance(row.mixer, Attention) or row.mixer.shares is None:
        return row
    source = row.mixer.shares
    return replace(row, mixer=replace(row.mixer, shares=kept.index(source))) if source in kept else None


def _block(before: DecoderStack, layer: int, row: LayerSpec) -> nn.Module:
    block = before.block(layer)
    return block.with_mixer(row.mixer) if row != before.spec.rows[layer] else block  # type: ignore[operator]
