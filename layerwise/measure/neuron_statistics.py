"""First two moments and the rate of positive values of every feed-forward neuron, over the real tokens of some text.

Tallies of parts of the text add up to that of the whole. A neuron is one entry of what enters the last
feed-forward matrix: act(gate) * up where the network is gated.

Shapes: L layers, W neurons of a layer, B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from layerwise.data.batch import Batch
from layerwise.stack.decoder import DecoderStack


@dataclass(frozen=True)
class NeuronStatistics:
    """Sums over `count` tokens, float64 [L, W]. Layers must be equally wide."""

    count: int
    sum_LW: Tensor
    squares_LW: Tensor
    positive_LW: Tensor

    def __add__(self, other: NeuronStatistics) -> NeuronStatistics:
        return NeuronStatistics(self.count + other.count, self.sum_LW + other.sum_LW,
                                self.squares_LW + other.squares_LW, self.positive_LW + other.positive_LW)

    @property
    def mean_LW(self) -> Tensor:
        return self.sum_LW / self.count

    @property
    def variance_LW(self) -> Tensor:
        return self.squares_LW / self.count - self.mean_LW**2

    @property
    def rate_LW(self) -> Tensor:
        """Share of tokens at which the neuron is above zero."""
        return self.positive_LW / self.count


@torch.inference_mode()
def neuron_statistics(stack: DecoderStack, batches: Iterable[Batch]) -> NeuronStatistics:
    """One pass over `batches`; padded tokens are left out. Raises BadOption for a layer without neurons of its own."""
    total: NeuronStatistics | None = None
    for batch in batches:
        shape = batch.tokens_BT.shape
        real_BT = torch.ones(shape, dtype=torch.bool) if batch.mask_BT is None else batch.mask_BT
        state = stack.start(batch.tokens_BT, batch.mask_BT)
        rows: list[tuple[Tensor, Tensor, Tensor]] = []
        for layer in range(len(stack)):
            with stack.capture("neurons", layers=range(layer, layer + 1)) as seen:
                state = stack.run(state, slice(layer, layer + 1))
            x_NW = seen[layer, "neurons"][real_BT.to(state.hidden.device)].double()
            rows.append((x_NW.sum(0), (x_NW**2).sum(0), (x_NW > 0).double().sum(0)))
        one = NeuronStatistics(int(real_BT.sum()), *(torch.stack(part) for part in zip(*rows, strict=True)))
        total = one if total is None else total + one
    assert total is not None, "no batches"
    return total
