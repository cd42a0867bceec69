"""The score by hand, and the system from end to end."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from layerwise.data.labelled import Labelled
from layerwise.systems.measure.lsa import score
from layerwise.testing import check_system
from layerwise.train.attack import FGSM


def test_the_score_sums_accuracies_in_per_cent() -> None:
    layer = nn.Linear(1, 1, bias=False)
    nn.init.ones_(layer.weight)
    data = Labelled(torch.tensor([[0.1], [0.3], [-0.2], [-9.0]]), torch.tensor([1, 1, 0, 0]), 2, "four")
    assert score(layer, data, [FGSM(eps, None) for eps in (0.0, 0.15, 0.25)]) == 100 + 75 + 50


@pytest.mark.slow
def test_it_runs() -> None:
    assert len(check_system("lsa")) == 4
