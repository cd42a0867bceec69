"""Rows of tokens from one place on: what comes before is run once and kept as keys and values.

In a causal model nothing before a place depends on what is changed there, so optimising or patching a late
position need not run the tokens before it again.

Shapes: B rows, P tokens before the place (longest row), A tokens from it on (longest row), C hidden width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from layerwise.errors import BadOption
from layerwise.stack.base import State
from layerwise.stack.decoder import Caches, DecoderStack


class Tail:
    """`rows` split at `places`, one each; the token at the place is the first of the tail.

    `last_B` indexes each row's last real token in its tail. Raises BadOption for a place outside its row.
    """

    def __init__(self, stack: DecoderStack, rows: Sequence[Sequence[int]], places: Sequence[int]) -> None:
        for row, place in zip(rows, places, strict=True):
            if not 0 <= place < len(row):
                raise BadOption(f"place {place} in a row of {len(row)} tokens", expected="a token of the row",
                                do="count tokens from 0")
        self.stack = stack
        lengths_B = torch.tensor([len(row) - place for row, place in zip(rows, places, strict=True)])
        width = int(lengths_B.max())
        self.tokens_BA = torch.tensor([list(row[place:]) + [row[0]] * (width - len(row) + place)
                                       for row, place in zip(rows, places, strict=True)])
        self.last_B = lengths_B - 1
        valid_BA = torch.arange(width) < lengths_B[:, None]
        self._before, before_BP = self._prefix(rows, places)
        self.mask_BS = torch.cat([before_BP, valid_BA], 1)

    @torch.no_grad()
    def _prefix(self, rows: Sequence[Sequence[int]], places: Sequence[int]) -> tuple[Caches, Tensor]:
        """Keys and values of what comes before, filled up on the left, and where it is real."""
        width, caches = max(places), Caches()
        mask_BP = torch.arange(width) >= width - torch.tensor(list(places))[:, None]
        if width:
            tokens_BP = torch.tensor([[row[0]] * (width - place) + list(row[:place])
                                      for row, place in zip(rows, places, strict=True)])
            self.stack.run(self.stack.start(tokens_BP, mask_BP, caches=caches))
        return caches, mask_BP

    @torch.no_grad()
    def enter(self, layer: int = 0) -> State:
        """The state that enters `layer`, [B, A, C]; run it with `run`, as often as wanted."""
        state = self.stack.start(self.tokens_BA, self.mask_BS, caches=self._kept())
        return self.stack.run(state, slice(0, layer))

    def run(self, state: State, layers: slice = slice(None)) -> State:
        """Run layers on a state of this tail, as `Stack.run`; gradients pass through the new tokens."""
        flow = state.shared
        fresh = replace(flow.forked(), caches=self._kept())
        return self.stack.run(State(state.hidden, state.layer, fresh), layers)

    def last(self, state: State) -> Tensor:
        """What the model predicts after each row: logits [B, V] of the last real token."""
        rows_B1C = state.hidden[torch.arange(len(self.last_B)), self.last_B][:, None]
        logits_B1V: Tensor = self.stack.finish(state.moved(rows_B1C, state.layer))
        return logits_B1V[:, 0]

    def _kept(self) -> Caches:
        """The prefix's caches, copied so that what is run on them leaves the originals as they are."""
        return {layer: cache.copied() for layer, cache in self._before.items()}
