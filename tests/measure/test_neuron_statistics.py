"""Sums equal a plain loop, parts add up, and filling is left out."""

from __future__ import annotations

import torch

from layerwise.data.batch import Batch, pad
from layerwise.measure.neuron_statistics import neuron_statistics
from layerwise.stack.decoder import DecoderStack

ROWS = [[1, 2, 3], [4, 5, 6, 7, 8], [9, 10]]
CLOSE = {"atol": 1e-6, "rtol": 1e-5}


def test_it_equals_a_loop_without_filling(tiny_stack: DecoderStack) -> None:
    values = []
    for row in ROWS:
        with tiny_stack.capture("neurons") as seen:
            tiny_stack(torch.tensor([row]))
        values.append(torch.stack([seen[layer, "neurons"][0] for layer in range(4)]).double())
    x_LNW = torch.cat(values, 1)
    found = neuron_statistics(tiny_stack, [pad(ROWS)])
    assert found.count == 10
    torch.testing.assert_close(found.mean_LW, x_LNW.mean(1), **CLOSE)
    torch.testing.assert_close(found.variance_LW, x_LNW.var(1, unbiased=False), **CLOSE)
    torch.testing.assert_close(found.rate_LW, (x_LNW > 0).double().mean(1))


def test_parts_add_up(tiny_stack: DecoderStack) -> None:
    whole = neuron_statistics(tiny_stack, [pad(ROWS)])
    last = neuron_statistics(tiny_stack, [Batch(torch.tensor([ROWS[2]]))])
    parts = neuron_statistics(tiny_stack, [pad(ROWS[:2])]) + last
    assert parts.count == whole.count
    torch.testing.assert_close(parts.squares_LW, whole.squares_LW, **CLOSE)
    assert torch.equal(parts.positive_LW, whole.positive_LW)
