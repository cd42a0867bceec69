"""The rank of what enters a layer and of what it adds, where it is known and against a float64 loop."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from layerwise.errors import BadOption
from layerwise.measure.engine import measure
from layerwise.measure.utilized_rank import UtilizedRank
from layerwise.stack.decoder import DecoderStack
from layerwise.stack.module import ModuleStack


class Low(nn.Module):
    """Adds something of rank two."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow, self.wide = nn.Linear(8, 2, bias=False), nn.Linear(2, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.wide(self.narrow(x))  # type: ignore[no-any-return]


def test_a_layer_that_writes_in_two_directions_has_rank_two() -> None:
    torch.manual_seed(0)
    stack = ModuleStack(nn.Sequential(Low(), Low()))
    found = measure(stack, [torch.randn(4, 60, 8)], UtilizedRank(eps=1e-6), progress=False)
    assert found["utilized-rank:inputs"].values[0] == 8
    assert found["utilized-rank:outputs"].values == (2, 2)
    assert found["utilized-rank"].values == (0.25, 0.25)


def reference(x_NC: Tensor, eps: float) -> int:
    rows = x_NC.double() / x_NC.double().norm(dim=1, keepdim=True)
    energy = torch.linalg.svdvals(rows - rows.mean(0)) ** 2
    return next(k for k in range(1, len(energy) + 1) if float(energy[:k].sum()) >= (1 - eps) * float(energy.sum()))


def test_ranks_equal_those_of_all_states_at_once(stack: DecoderStack, tokens_NT: Tensor) -> None:
    found = measure(stack, tokens_NT, UtilizedRank(eps=0.1), batch=1, progress=False)
    with stack.capture("input", "output") as seen:
        stack(tokens_NT)
    for layer in range(len(stack)):
        x_NC, y_NC = (seen[layer, site].flatten(0, 1) for site in ("input", "output"))  # type: ignore[index]
        assert found["utilized-rank:inputs"].values[layer] == reference(x_NC, 0.1)
        assert found["utilized-rank:outputs"].values[layer] == reference(y_NC - x_NC, 0.1)


def test_a_layer_that_changes_the_width_writes_nothing_comparable() -> None:
    blocks = nn.Sequential(nn.Sequential(nn.Linear(4, 6), nn.Tanh()), nn.Sequential(nn.Linear(6, 6), nn.Tanh()))
    found = measure(ModuleStack(blocks, blocks=["0", "1"]), [torch.randn(9, 4)], UtilizedRank(), progress=False)
    assert [math.isnan(value) for value in found["utilized-rank"].values] == [True, False]


@pytest.mark.parametrize("eps", [0.0, 1.0])
def test_impossible_shares(stack: DecoderStack, tokens_NT: Tensor, eps: float) -> None:
    with pytest.raises(BadOption, match="eps"):
        measure(stack, tokens_NT, UtilizedRank(eps), progress=False)
