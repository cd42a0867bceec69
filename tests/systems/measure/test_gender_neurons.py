"""The system from end to end on its small model, and its interventions by hand."""

from __future__ import annotations

import pytest
import torch

from layerwise.systems.measure.gender_neurons import _changes, _early
from layerwise.testing import check_system


@pytest.mark.slow
def test_it_runs() -> None:
    checks = {check.name: check for check in check_system("gender-neurons")}
    assert len(checks) == 4
    assert all(count > 0 for count in checks["category neurons steer pronouns"].measured["neurons"].values())


def test_other_categories_are_off_and_the_target_is_doubled() -> None:
    changes = _changes([{0: [1], 2: [3]}, {0: [2]}, {1: [0]}], target=0)
    x_BTW = torch.ones(1, 1, 4)
    assert changes[0](x_BTW).flatten().tolist() == [1, 2, 0, 1]
    assert changes[1](x_BTW).flatten().tolist() == [0, 1, 1, 1]
    assert changes[2](x_BTW).flatten().tolist() == [1, 1, 1, 2]


def test_early_layers_are_judged_without_the_cap() -> None:
    early = [{0: list(range(9))}, {1: [0]}, {}]
    late = [{5: list(range(9))}, {0: [0]}, {}]
    assert _early(early, late, 6, "full").holds is True
    assert _early(late, early, 6, "full").holds is False
