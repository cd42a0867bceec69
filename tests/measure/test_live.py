"""Live bytes by hand."""

from __future__ import annotations

import torch
from torch.func import grad, vmap

from layerwise.measure.live import peak_bytes

KB = 1024


def test_what_is_freed_is_not_counted_twice() -> None:
    def work() -> None:
        for _ in range(5):
            torch.zeros(256)

    assert peak_bytes(work) == KB


def test_what_is_kept_adds_up_and_views_are_free() -> None:
    def work() -> None:
        kept = [torch.zeros(256) for _ in range(3)]
        _ = [x.view(16, 16)[2:] for x in kept]

    assert peak_bytes(work) == 3 * KB


def test_what_was_there_before_is_not_counted() -> None:
    before = torch.zeros(10_000)
    assert peak_bytes(lambda: before[:256] + 1) == KB


def test_vectorised_gradients_are_seen() -> None:
    x, w = torch.ones(64, 256), torch.ones(256)

    def work() -> object:
        return vmap(grad(lambda weight, row: (weight * row).sum().tanh()), in_dims=(None, 0))(w, x)

    assert peak_bytes(work) >= 64 * KB
