"""Labelled inputs, drawn digits and half moons: shapes, seeds, and that the label can be read."""

from __future__ import annotations

import pytest
import torch

from layerwise.data.glyphs import glyphs
from layerwise.data.images import ImageData
from layerwise.data.labelled import Labelled, loaded
from layerwise.data.moons import moons
from layerwise.errors import BadData


def test_batches_are_in_order_and_complete() -> None:
    data = Labelled(torch.arange(7.0)[:, None], torch.arange(7), 7, "seven")
    pieces = list(data.batches(3))
    assert [len(x) for x, _ in pieces] == [3, 3, 1]
    assert torch.cat([labels for _, labels in pieces]).tolist() == list(range(7))


def test_a_drawn_subset_keeps_pairs_and_order() -> None:
    data = Labelled(torch.arange(50.0)[:, None], torch.arange(50), 50, "fifty").take(9, seed=1)
    assert data.x_N[:, 0].long().tolist() == data.labels_N.tolist() == sorted(data.labels_N.tolist())


def test_labels_must_match() -> None:
    with pytest.raises(BadData, match="3 inputs and 2 labels"):
        Labelled(torch.zeros(3, 1), torch.zeros(2), 2, "broken")


def test_images_are_loaded_normalised() -> None:
    data = loaded(ImageData.shapes(5))
    assert data.x_N.shape == (5, 3, 32, 32) and data.classes == 4 and float(data.x_N.abs().max()) <= 1


def test_glyphs_repeat_with_the_seed_and_not_without() -> None:
    a, b, c = glyphs(20, 1), glyphs(20, 1), glyphs(20, 2)
    assert torch.equal(a.x_N, b.x_N) and not torch.equal(a.x_N, c.x_N)
    assert a.x_N.shape == (20, 1, 16, 16) and float(a.x_N.min()) >= 0 and float(a.x_N.max()) <= 1


def test_plain_glyphs_of_one_digit_differ_in_contrast_only() -> None:
    data = glyphs(200, 3, side=28, warp=0.0, noise=0.0)
    ones = data.x_N[data.labels_N == 1].flatten(1)
    ones = ones / ones.norm(dim=1, keepdim=True)
    assert float((ones @ ones.T).min()) > 0.9999
    means = torch.stack([data.x_N[data.labels_N == digit].flatten(1).mean(0) for digit in range(10)])
    cosine = torch.nn.functional.cosine_similarity(means[:, None], means[None], dim=-1)
    assert float((cosine - torch.eye(10)).max()) < 0.97


def test_nearest_means_read_most_warped_glyphs() -> None:
    train, test = glyphs(2000, 4, warp=0.5), glyphs(300, 5, warp=0.5)
    means = torch.stack([train.x_N[train.labels_N == digit].flatten(1).mean(0) for digit in range(10)])
    right = torch.cdist(test.x_N.flatten(1), means).argmin(1) == test.labels_N
    assert float(right.float().mean()) > 0.6


def test_noiseless_moons_lie_on_their_circles() -> None:
    data = moons(100, 0, noise=0.0)
    centre = torch.stack([data.labels_N.float(), 0.5 * data.labels_N], 1)
    assert torch.allclose((data.x_N - centre).norm(dim=1), torch.ones(100), atol=1e-6)
    assert bool(((data.x_N[:, 1] >= 0) == (data.labels_N == 0))[data.labels_N == 0].all())
