"""The zoo is what it says, and the system runs from end to end."""

from __future__ import annotations

import torch

from layerwise.data.glyphs import glyphs
from layerwise.systems.measure.probex import SCALES, WIDTHS, grown
from layerwise.testing import check_system
from layerwise.train.population import Population, by_class


def test_children_differ_from_their_root_and_know_half_of_the_classes() -> None:
    items = by_class(glyphs(300, 0)) - 0.5
    roots = Population.fresh(2, WIDTHS, 0)
    zoo = grown(roots, torch.arange(6) % 2, items, SCALES["quick"], 1)
    assert zoo.classes_NY.sum(1).tolist() == [5] * 6
    assert not torch.equal(zoo.models.weights[0][0], roots.weights[0][0])
    assert (zoo.models.weights[0][0] - roots.weights[0][0]).norm() < (roots.weights[0][1] - roots.weights[0][0]).norm()


def test_it_runs() -> None:
    checks = check_system("probex")
    assert len(checks) == 4
    assert checks[-1].holds is True
