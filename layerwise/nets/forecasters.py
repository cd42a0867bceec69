"""Small forecasters of several families that share one shape of input and output.

All see a scaled window of `context` steps and answer with the next `horizon`. `states` gives what leaves every
layer as the same number of tokens, so that depth profiles of different families can be compared.

Shapes: N windows, T steps of context, K tokens, C width.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

Family = Literal["transformer", "gru", "tcn", "mixer"]
PATCH = 4


class Forecaster(nn.Module):
    """An embedding, `depth` layers of one family, and a linear read-out of all tokens."""

    def __init__(self, family: Family, depth: int, width: int = 32, context: int = 64, horizon: int = 32) -> None:
        super().__init__()
        self.family, self.tokens = family, context // PATCH
        self.embed = nn.Linear(PATCH, width)
        self.place = nn.Parameter(0.02 * nn.init.normal_(self.embed.weight.new_empty(self.tokens, width)))
        self.layers = nn.ModuleList(_layer(family, place, width, self.tokens) for place in range(depth))
        self.read = nn.Linear(self.tokens * width, horizon)

    def states(self, past_NT: Tensor) -> list[Tensor]:
        """What leaves every layer, [N, K, C] each."""
        x_NKC = self.embed(past_NT.unflatten(1, (self.tokens, PATCH))) + self.place
        found = []
        for layer in self.layers:
            x_NKC = layer(x_NKC)
            found.append(x_NKC)
        return found

    def forward(self, past_NT: Tensor) -> Tensor:
        ahead_NH: Tensor = self.read(self.states(past_NT)[-1].flatten(1))
        return ahead_NH


def _layer(family: Family, place: int, width: int, tokens: int) -> nn.Module:
    if family == "transformer":
        return nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, "gelu", batch_first=True, norm_first=True)
    if family == "gru":
        return Recurrent(width)
    return Causal(width, 2**place) if family == "tcn" else Mixer(width, tokens)


class Recurrent(nn.Module):
    """A gated recurrent layer with a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.cell = nn.GRU(width, width, batch_first=True)

    def forward(self, x_NKC: Tensor) -> Tensor:
        seen_NKC: Tensor = self.cell(x_NKC)[0]
        return x_NKC + seen_NKC


class Causal(nn.Module):
    """A convolution over earlier tokens, `dilation` apart, with a shortcut."""

    def __init__(self, width: int, dilation: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(width, width, 3, dilation=dilation)
        self.reach = 2 * dilation

    def forward(self, x_NKC: Tensor) -> Tensor:
        padded_NCK = F.pad(x_NKC.transpose(1, 2), (self.reach, 0))
        return x_NKC + F.gelu(self.conv(padded_NCK)).transpose(1, 2)


class Mixer(nn.Module):
    """Mixes tokens, then channels."""

    def __init__(self, width: int, tokens: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList((nn.LayerNorm(width), nn.LayerNorm(width)))
        self.across = nn.Sequential(nn.Linear(tokens, 2 * tokens), nn.GELU(), nn.Linear(2 * tokens, tokens))
        self.within = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x_NKC: Tensor) -> Tensor:
        x_NKC = x_NKC + self.across(self.norms[0](x_NKC).transpose(1, 2)).transpose(1, 2)
        mixed_NKC: Tensor = x_NKC + self.within(self.norms[1](x_NKC))
        return mixed_NKC
