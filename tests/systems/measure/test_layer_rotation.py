"""How runs are read, and the system from end to end."""

from __future__ import annotations

import pytest

from layerwise.systems.measure.layer_rotation import ALPHAS, Trained, _balance, _best, _correlation
from layerwise.testing import check_system


def runs(sign: float = 1.0) -> list[Trained]:
    """Ten fitted runs whose accuracy rises (or falls) with rotation, and one that is not fitted."""
    fitted = [Trained(f"alpha {ALPHAS[i % 3]:g}, rho 3^-{i // 3}", 0, 1.0, 0.5 + sign * 0.01 * i, (0.1 * i, 0.1 * i))
              for i in range(10)]
    return [*fitted, Trained("alpha 0, rho 3^-9", 0, 0.5, 0.1, (9.0, 9.0))]


def test_only_fitted_runs_are_correlated() -> None:
    found = _correlation("c", runs(), "full", 0)
    assert found.holds and found.measured["by mean over layers"] == 1 and found.measured["fitted runs"] == 10
    assert _correlation("c", runs(-1), "full", 0).holds is False
    assert _correlation("c", runs()[:7], "full", 0).holds is None


def test_the_best_run_must_have_turned() -> None:
    assert _best(runs(), "full").holds and _best(runs(-1), "full").holds is False


def test_settings_are_compared_at_their_best_rate() -> None:
    found = _balance(runs(), "full")
    assert found.measured == {"alpha -0.6": 0.59, "alpha 0": 0.57, "alpha 0.6": 0.58} and found.holds is False


@pytest.mark.slow
def test_it_runs() -> None:
    assert len(check_system("layer-rotation")) == 4
