"""Copying one token's state from another prompt's run, layer by layer: until where does it change the answer?

Shapes: L layers, B pairs of prompts, C hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from layerwise.stack.base import Stack, State
from layerwise.stack.decoder import DecoderStack
from layerwise.stack.tail import Tail


@torch.no_grad()
def place_states(stack: Stack, rows: Sequence[Sequence[int]], places: Sequence[int]) -> Tensor:
    """What enters every layer, and at last the head, at one place of each row: [L + 1, B, C]."""
    width = max(map(len, rows))
    state: State = stack.start(torch.tensor([[*row, *[row[0]] * (width - len(row))] for row in rows]))
    index = torch.arange(len(rows)), torch.tensor(list(places))
    found = [state.hidden[index]]
    while state.layer < len(stack):
        state = stack.run(state, slice(state.layer, state.layer + 1))
        found.append(state.hidden[index])
    return torch.stack(found)


@torch.no_grad()
def swapped(stack: DecoderStack, rows: Sequence[Sequence[int]], places: Sequence[int], states_LBC: Tensor,
            layers: Sequence[int]) -> Iterator[Tensor]:
    """Logits [B, V] after each row for each layer, with `states_LBC[layer]` entering that layer at the place."""
    tail = Tail(stack, rows, places)
    for layer in layers:
        entering = tail.enter(layer)
        hidden = torch.cat([states_LBC[layer][:, None].to(entering.hidden), entering.hidden[:, 1:]], 1)
        yield tail.last(tail.run(entering.moved(hidden, layer)))


def drift(states_LBC: Tensor, other_LBC: Tensor) -> Tensor:
    """1 - cosine between the states of two runs, [L, B]."""
    return 1 - torch.cosine_similarity(states_LBC.float(), other_LBC.float(), dim=-1)
