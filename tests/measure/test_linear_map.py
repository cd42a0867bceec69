"""Affine maps between two models: exact where there is one, and against numpy's least squares."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from layerwise.measure.linear_map import leaving, map_errors, matches
from layerwise.testing.stacks import random_stack


def test_an_affine_image_is_found_and_noise_is_not() -> None:
    generator = torch.Generator().manual_seed(0)
    h, noise = (torch.randn(200, width, generator=generator, dtype=torch.float64) for width in (4, 6))
    image = h @ torch.randn(4, 6, generator=generator, dtype=torch.float64) + 3
    errors = map_errors([h], [image, noise], ridge=1e-12)
    assert float(errors[0, 0]) < 1e-6
    assert float(errors[0, 1]) > 0.9
    assert matches(torch.tensor([[1.0, 4.0], [3.0, 2.0]])) == [0, 1]


def test_errors_equal_those_of_least_squares() -> None:
    generator = torch.Generator().manual_seed(1)
    h, g = (torch.randn(60, width, generator=generator) for width in (5, 3))
    x = np.hstack([h.numpy(), np.ones((60, 1))]).astype(np.float64)
    fitted, *_ = np.linalg.lstsq(x[::2], g.numpy()[::2].astype(np.float64), rcond=None)
    left = np.linalg.norm(x[1::2] @ fitted - g.numpy()[1::2], axis=1) / np.linalg.norm(g.numpy()[1::2], axis=1)
    assert float(map_errors([h], [g], ridge=1e-12)[0, 0]) == pytest.approx(left.mean(), rel=1e-6)


def test_states_leave_every_layer_at_the_chosen_places() -> None:
    stack, tokens = random_stack(3), torch.arange(12).view(2, 6)
    seen = leaving(stack, tokens)
    assert [tuple(states.shape) for states in seen] == [(10, 64)] * 3
    places = torch.zeros(2, 6, dtype=torch.bool)
    places[1, 4] = True
    with stack.capture("output", layers=range(2, 3)) as captured:
        stack(tokens)
    assert torch.equal(leaving(stack, tokens, places)[2][0], captured[2, "output"][1, 4])
