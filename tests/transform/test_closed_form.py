"""One wish is met exactly, many are the ridge solution, and usual inputs move least."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from layerwise.errors import BadData
from layerwise.transform.closed_form import batch, directions, rank_one, ridged


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


WEIGHT_OI, INPUTS_NI, KEYS_NI, RESIDUALS_NO = draw(5, 8), draw(40, 8, seed=1), draw(3, 8, seed=2), draw(3, 5, seed=3)
MOMENT_II = INPUTS_NI.T @ INPUTS_NI / 40


def test_one_wish_is_met_exactly() -> None:
    now_I = KEYS_NI[0] + 0.1 * draw(8, seed=4)
    changed = rank_one(WEIGHT_OI, directions(KEYS_NI, MOMENT_II)[0], RESIDUALS_NO[0], now_I)
    torch.testing.assert_close(changed @ now_I, WEIGHT_OI @ now_I + RESIDUALS_NO[0])
    assert torch.linalg.matrix_rank(changed - WEIGHT_OI) == 1


def test_of_all_matrices_that_meet_one_wish_it_moves_usual_inputs_least() -> None:
    key_I, residual_O = KEYS_NI[0], RESIDUALS_NO[0]
    best = rank_one(WEIGHT_OI, directions(KEYS_NI, MOMENT_II)[0], residual_O, key_I) - WEIGHT_OI

    def moved(change_OI: Tensor) -> float:
        return float((change_OI @ MOMENT_II @ change_OI.T).trace())

    for seed in range(20):
        other = best + 0.1 * draw(5, 8, seed=seed) @ (torch.eye(8) - torch.outer(key_I, key_I) / (key_I @ key_I))
        torch.testing.assert_close(other @ key_I, best @ key_I)
        assert moved(other) > moved(best)


@pytest.mark.parametrize("weight", [0.1, 10.0])
def test_many_wishes_are_the_ridge_solution(weight: float) -> None:
    change = batch(WEIGHT_OI, KEYS_NI, RESIDUALS_NO, MOMENT_II, weight) - WEIGHT_OI
    root_II = torch.linalg.cholesky(weight * MOMENT_II)
    inputs = torch.cat([KEYS_NI, root_II.T])
    outputs = torch.cat([RESIDUALS_NO, torch.zeros(8, 5, dtype=torch.float64)])
    torch.testing.assert_close(change.T, torch.linalg.lstsq(inputs, outputs).solution)


def test_without_usual_inputs_every_wish_is_met() -> None:
    changed = batch(WEIGHT_OI, KEYS_NI, RESIDUALS_NO, MOMENT_II, 1e-9)
    torch.testing.assert_close(changed @ KEYS_NI.T, WEIGHT_OI @ KEYS_NI.T + RESIDUALS_NO.T, atol=1e-6, rtol=1e-6)


def test_the_dtype_of_the_weight_stays() -> None:
    assert batch(WEIGHT_OI.bfloat16(), KEYS_NI, RESIDUALS_NO, MOMENT_II, 1.0).dtype == torch.bfloat16


def test_a_ridge_makes_a_moment_of_one_input_invertible() -> None:
    moment_II = ridged(torch.outer(KEYS_NI[0], KEYS_NI[0]))
    assert bool(torch.linalg.cholesky_ex(moment_II).info == 0)
    torch.testing.assert_close(moment_II.trace(), (KEYS_NI[0] @ KEYS_NI[0]) * 1.0001)


def test_an_input_that_the_key_does_not_meet_is_refused() -> None:
    with pytest.raises(BadData, match="does not meet"):
        rank_one(WEIGHT_OI, torch.eye(8)[0], RESIDUALS_NO[0], torch.eye(8)[1])
