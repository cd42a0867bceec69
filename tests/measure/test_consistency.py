"""Agreement of answers by hand, and against a loop over pairs."""

from __future__ import annotations

import itertools

import pytest
import torch

from layerwise.measure.consistency import chance_dispersion, dispersion, majority

ANSWERS = torch.tensor([[3, 3, 1, 3], [0, 1, 2, 3], [2, 2, 2, 2], [1, 1, 4, 4]])


def test_majority() -> None:
    answer, share = majority(ANSWERS, 5)
    assert answer.tolist() == [3, 0, 2, 1]
    assert share.tolist() == [0.75, 0.25, 1.0, 0.5]


def test_dispersion_is_the_share_of_pairs_that_disagree() -> None:
    pairs = [[a != b for a, b in itertools.combinations(row, 2)] for row in ANSWERS.tolist()]
    assert dispersion(ANSWERS, 5).tolist() == pytest.approx([sum(row) / len(row) for row in pairs])


def test_dispersion_does_not_depend_on_the_number_of_draws() -> None:
    generator = torch.Generator().manual_seed(0)
    few, many = (torch.randint(4, (4000, draws), generator=generator) for draws in (3, 12))
    assert float(dispersion(few, 4).mean()) == pytest.approx(0.75, abs=0.02)
    assert float(dispersion(many, 4).mean()) == pytest.approx(0.75, abs=0.02)
    assert chance_dispersion(many, 4) == pytest.approx(0.75, abs=0.01)


def test_always_the_same_answer_is_what_base_rates_give() -> None:
    assert chance_dispersion(torch.full((5, 3), 4), 10) == 0
