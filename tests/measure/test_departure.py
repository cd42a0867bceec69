"""Where items leave the others' states: planted, by hand, and against the distances of one layer."""

from __future__ import annotations

import pytest
import torch

from layerwise.measure.departure import departure, distances, normalized
from layerwise.measure.neighbours import deviation


def test_departure_needs_layers_in_a_row() -> None:
    z_LN = torch.tensor([[2.0, 2, 0], [0, 2, 0], [2, 2, 0], [2, 0, 0], [2, 0, 2]])
    assert departure(z_LN, alpha=1.0, hold=3) == [2, 0, None]


def test_normalized_distances_of_correct_answers_have_unit_deviation() -> None:
    distance_LN = torch.tensor([[1.0, 3.0, 10.0]])
    z_LN = normalized(distance_LN, torch.tensor([False, False, True]))
    assert z_LN[0, 2] == pytest.approx((10 - 2) / 2**0.5)


def test_distances_are_those_of_each_layer_alone() -> None:
    states_NLC = torch.randn(30, 2, 4, generator=torch.Generator().manual_seed(0))
    reference, judged = torch.arange(20), torch.arange(20, 30)
    found = distances(states_NLC, reference, judged, scale=False)
    for layer in range(2):
        assert torch.equal(found[layer], deviation(states_NLC[judged, layer], states_NLC[reference, layer]))
    scaled = distances(states_NLC * torch.tensor([1.0, 1, 1, 100]), reference, judged, scale=True)
    assert torch.allclose(scaled, distances(states_NLC, reference, judged, scale=True), atol=1e-4)
