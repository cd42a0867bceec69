"""What a recurrent layer keeps of every running sequence: one slot each, however many tokens it has read.

Shapes: R rows of a step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from layerwise.serve.pool import zeros
from layerwise.spec import StateSpace


class StatePool:
    """`count` slots; the convolution's last inputs in the dtype of the model, the state in float32."""

    def __init__(self, count: int, mixer: StateSpace, dtype: torch.dtype, device: torch.device) -> None:
        tail, state = mixer.kept
        self.stores = zeros((count, *tail), dtype, device), zeros((count, *state), torch.float32, device)

    def read(self, slots_R: Tensor, fresh_R: Tensor | None) -> tuple[Tensor, ...]:
        """Copies of what lies in the slots; zero for rows whose sequence has read nothing yet."""
        found = tuple(store.index_select(0, slots_R) for store in self.stores)
        if fresh_R is not None:
            for kept in found:
                kept.masked_fill_(fresh_R.view(-1, *[1] * (kept.dim() - 1)), 0)
        return found

    def write(self, slots_R: Tensor, kept: tuple[Tensor, ...]) -> None:
        """Put what is kept after a step into the slots."""
        for store, new in zip(self.stores, kept, strict=True):
            store.index_copy_(0, slots_R, new.to(store.dtype))
