"""The system on states planted so that the claims are true, on states without any structure, and end to end."""

from __future__ import annotations

import pytest
import torch

from layerwise.stack.decoder import DecoderStack
from layerwise.systems.measure.rema import Judged, analysis, letter_items, sums_items
from layerwise.testing import check_system


def planted(gap: float) -> Judged:
    """Right answers on a plane of two dimensions; wrong ones leave it by `gap` from layer 3 of 6 on."""
    generator = torch.Generator().manual_seed(0)
    right_N = torch.rand(240, generator=generator) < 0.6
    turn = torch.linalg.qr(torch.randn(40, 40, generator=generator)).Q
    states = torch.randn(240, 6, 2, generator=generator) @ turn[:2]
    states += 0.01 * torch.randn(240, 6, 40, generator=generator)
    states[~right_N, 3:] += gap * turn[2]
    return Judged({"answer": states}, right_N, torch.zeros(240), ["easy", "hard"] * 120)


def test_planted_errors_are_found_where_they_begin() -> None:
    checks = {check.name: check for check in analysis("t", planted(2.0), 40, 0)}
    assert [check.holds for check in checks.values()] == [True] * 4
    assert checks["t: wrong answers leave the correct ones at some layer"].measured["from layer"] == 3


def test_without_a_difference_nothing_is_found() -> None:
    dimension, separation, diverging, matched = analysis("t", planted(0.0), 40, 0)
    assert dimension.holds
    assert [separation.holds, diverging.holds, matched.holds] == [False] * 3


def test_too_few_answers_cannot_tell() -> None:
    judged = planted(2.0)
    judged.right_N[:] = True
    [check] = analysis("t", judged, 40, 0)
    assert check.holds is None


def test_items_are_right() -> None:
    for prompt, answer, _ in sums_items(0):
        a, b = prompt.removesuffix(" =").split(" + ")
        assert int(answer) == int(a) + int(b)
    for prompt, answer, _ in letter_items(0)[:50]:
        words = prompt.split()
        assert int(answer) == words[5].count(words[2]) > 0


def test_it_runs(small: DecoderStack) -> None:
    check_system("rema")


@pytest.mark.real
@pytest.mark.slow
def test_it_runs_on_the_real_model() -> None:
    check_system("rema")
