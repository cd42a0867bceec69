"""Verdicts on bills made up to order, and the system end to end."""

from __future__ import annotations

import pytest

from layerwise.data.glyphs import glyphs
from layerwise.measure.energy import Modelled, Spent
from layerwise.measure.ledger import Booked, Ledger
from layerwise.systems.measure.full_cycle_energy import SCALES, Bench, _even, _intensity, _light, _zeros
from layerwise.testing import check_system


def bench(bills: dict[str, tuple[float, float, float]]) -> Bench:
    """Entrants with joules of development, joules of a query, accuracy."""
    data = glyphs(10, 0)
    made = Bench(SCALES["quick"], Modelled(), data, data, 0)
    for name, (development, query, accuracy) in bills.items():
        made.ledgers[name] = Ledger(name, [Booked("train", "", Spent(development, 1.0, True))], query, True)
        made.accuracy[name], made.numbers[name] = accuracy, len(made.numbers)
    return made


def test_a_cheap_query_that_was_dear_to_make() -> None:
    made = bench({"dense": (10, 1e-3, 0.9), "int8": (40, 1e-4, 0.9), "low rank, healed": (20, 9e-4, 0.9),
                  "distilled, teacher paid": (20, 2e-3, 0.9), "pruned, healed": (20, 1e-3, 0.9)})
    again = bench({"dense": (10, 1.05e-3, 0.9)})
    assert _intensity(made, again).holds is True
    assert _light(made, again).holds is True
    even = _even(made, again)
    assert even.holds is True
    assert even.measured["int8"] == pytest.approx(30 / 9e-4, rel=1e-3)
    assert even.measured["distilled, teacher paid"] == "never"
    assert _zeros(made, again).holds is True


def test_one_that_is_best_in_everything() -> None:
    made = bench({"dense": (10, 1e-3, 0.9), "int8": (1, 1e-4, 0.9), "low rank, healed": (20, 9e-4, 0.9),
                  "pruned, healed": (20, 5e-4, 0.9)})
    again = bench({"dense": (10, 1e-3, 0.9)})
    assert _intensity(made, again).holds is False
    assert _light(made, again).holds is False
    assert _even(made, again).holds is False
    assert _zeros(made, again).holds is False


def test_what_noise_could_have_made_does_not_count() -> None:
    made = bench({"dense": (10, 1e-3, 0.9), "small": (2, 1.1e-3, 0.9), "int8": (50, 0.95e-3, 0.9)})
    again = bench({"dense": (10, 1.2e-3, 0.9)})
    assert _intensity(made, again).holds is False
    assert _light(made, again).holds is False
    assert _even(made, again).holds is False


@pytest.mark.slow
def test_it_runs() -> None:
    assert len(check_system("full-cycle-energy")) == 4
