"""Planted neurons are found, scores follow the formula, and no layer gives more than its share."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from layerwise.errors import BadData
from layerwise.measure.neuron_statistics import NeuronStatistics
from layerwise.measure.specific_neurons import (
    Specificity,
    Thresholds,
    candidates,
    entropy_candidates,
    like,
    ratio_candidates,
    relaxed,
    select,
    specificity,
)


def statistics(x_NLW: Tensor) -> NeuronStatistics:
    x = x_NLW.double()
    return NeuronStatistics(len(x), x.sum(0), (x**2).sum(0), (x > 0).double().sum(0))


def draws(planted: dict[int, tuple[int, int]]) -> list[NeuronStatistics]:
    """Three categories of 400 tokens, 4 layers of 50 neurons; `planted` names one neuron of each category."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for category in range(3):
        x = torch.randn(400, 4, 50, generator=generator) - 1
        layer, neuron = planted[category]
        x[:, layer, neuron] += 2
        found.append(statistics(x))
    return found


PLANTED = {0: (0, 7), 1: (2, 11), 2: (3, 49)}


def test_planted_neurons_are_the_only_ones_with_a_high_score() -> None:
    score_GLW = candidates(specificity(draws(PLANTED)), Thresholds(effect=3.0, odds=3.0))
    for category, place in PLANTED.items():
        assert score_GLW[category].nonzero().tolist() == [list(place)]


def test_scores_follow_the_formula() -> None:
    a = statistics(torch.tensor([[[1.0, -1.0]], [[3.0, -1.0]]]))
    b = statistics(torch.tensor([[[1.0, 2.0]], [[-1.0, 2.0]]]))
    found = specificity([a, b])
    e = torch.tensor([2 / math.sqrt((1 + 1) / 2 + 1e-4), 0.0], dtype=torch.float64)
    o = torch.tensor([math.log((1 - 1e-4) / 1e-4), 0.0], dtype=torch.float64)
    m = torch.tensor([2 / 0.01, 0.0], dtype=torch.float64)

    def standard(x: Tensor) -> Tensor:
        return (x - x.mean()) / x.std()

    torch.testing.assert_close(found.effect_GLW[0, 0], standard(e))
    torch.testing.assert_close(found.score_GLW[0, 0], 0.45 * standard(e) + 0.35 * standard(o) + 0.2 * standard(m))
    torch.testing.assert_close(found.rate_GLW[1, 0], torch.tensor([0.5, 1 - 1e-4], dtype=torch.float64))


def test_neurons_of_least_entropy_are_those_that_fire_for_one_category() -> None:
    score_GLW = entropy_candidates(specificity(draws(PLANTED)))
    for category, place in PLANTED.items():
        assert int(score_GLW[category].argmax()) == place[0] * 50 + place[1]
    alike = specificity([statistics(torch.ones(4, 1, 2))] * 3)
    assert float(entropy_candidates(alike).abs().max()) < 1e-9
    rare = specificity([statistics(torch.cat([torch.ones(int(category == 0), 1, 2), -torch.ones(99, 1, 2)]))
                        for category in range(3)])
    assert not bool(entropy_candidates(rare).any())


def test_a_neuron_of_two_categories_belongs_to_none() -> None:
    both = draws({0: (0, 7), 1: (0, 7), 2: (3, 49)})
    score_GLW = candidates(specificity(both), Thresholds(effect=1.0, odds=1.0, lead=2.0))
    assert not bool(score_GLW[:, 0, 7].any()) and bool(score_GLW[2, 3, 49] > 0)


def test_thresholds_are_lowered_until_there_are_enough() -> None:
    found, hard = specificity(draws(PLANTED)), Thresholds(effect=40.0, odds=40.0)
    assert not bool(candidates(found, hard).any())
    easy = relaxed(found, hard, least=1, rounds=100)
    assert int((candidates(found, easy) > 0).flatten(1).sum(1).min()) == 1 and easy.effect > 1
    assert relaxed(found, easy, least=1) == easy
    assert relaxed(found, hard, least=10**6, rounds=200) == Thresholds(0.01, 0.1, 0.1, 0.1)


def test_the_ratio_rule_compares_rates_of_the_two_best() -> None:
    rate_GLW = torch.tensor([[[0.5, 0.5, 0.015]], [[0.4, 0.48, 0.001]], [[0.1, 0.1, 0.001]]])
    found = Specificity(rate_GLW, rate_GLW, rate_GLW, rate_GLW)
    expected = torch.zeros(3, 1, 3)
    expected[0, 0, 0] = 1.25
    torch.testing.assert_close(ratio_candidates(found), expected)


def test_the_best_are_selected_within_the_cap() -> None:
    score_LW = torch.tensor([[9.0, 8.0, 7.0], [1.0, 0.0, -1.0]])
    assert select(score_LW, 2) == {0: [0, 1]}
    assert select(score_LW, 3, per_layer=1) == {0: [0], 1: [0]}
    assert select(score_LW, 9) == {0: [0, 1, 2], 1: [0]}


def test_controls_have_as_many_neurons_of_every_layer() -> None:
    units = {0: [1, 2, 3], 5: [4]}
    control = like(units, 40, 0)
    assert {layer: len(set(chosen)) for layer, chosen in control.items()} == {0: 3, 5: 1}
    assert control == like(units, 40, 0) != like(units, 40, 1)


def test_one_category_has_nothing_to_be_told_from() -> None:
    with pytest.raises(BadData, match="two or more"):
        specificity(draws(PLANTED)[:1])
