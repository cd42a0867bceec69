"""Counters that wrap, idle power, and the model where there is no meter."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from layerwise.errors import BadOption, MissingExtra
from layerwise.measure import energy
from layerwise.measure.energy import Meter, Modelled, Rapl, counters, meter


def zone(folder: Path, number: str, name: str, value: int, most: int = 1000) -> Path:
    place = folder / f"intel-rapl:{number}"
    place.mkdir()
    for file, text in {"name": name, "energy_uj": value, "max_energy_range_uj": most}.items():
        (place / file).write_text(f"{text}\n")
    return place


class Steady(Meter):
    """A counter at two watts."""

    name = "steady"

    def joules(self, work: object) -> float:
        start = time.perf_counter()
        work()  # type: ignore[operator]
        return 2.0 * (time.perf_counter() - start)


def test_packages_and_memory_are_read_once(tmp_path: Path) -> None:
    zone(tmp_path, "0", "package-0", 10)
    zone(tmp_path, "0:0", "core", 10)
    zone(tmp_path, "0:1", "dram", 10)
    assert [place.name for place in counters(tmp_path)] == ["intel-rapl:0", "intel-rapl:0:1"]


def test_a_counter_that_wraps(tmp_path: Path) -> None:
    place = zone(tmp_path, "0", "package-0", 900)
    found = Rapl(tmp_path).spent(lambda: (place / "energy_uj").write_text("100"))
    assert found.joules == pytest.approx(200e-6)
    assert not found.modelled


def test_idle_power_is_subtracted() -> None:
    steady = Steady()
    assert steady.rest(0.02) == pytest.approx(2.0, rel=0.05)
    assert steady.spent(lambda: time.sleep(0.01)).joules == pytest.approx(0, abs=0.01)


def test_the_model_is_watts_times_processor_time() -> None:
    modelled = Modelled(watts=10.0)
    assert modelled.spent(lambda: time.sleep(0.02)).joules < 0.1
    start = time.process_time()
    found = modelled.spent(lambda: sum(range(300_000)))
    assert 0 < found.joules <= 10 * (time.process_time() - start) + 1e-3
    assert found.modelled
    assert modelled.rest(0.0) == 0


def test_without_a_meter_the_model_is_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(energy, "counters", lambda folder=tmp_path: [])
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert meter().name == "model"
    with pytest.raises(BadOption, match="no energy counter"):
        meter("rapl")
    with pytest.raises(BadOption, match="auto or one of"):
        meter("guess")  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["zeus", "codecarbon"])
def test_an_absent_package_is_named(kind: energy.Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, kind, None)
    monkeypatch.setitem(__import__("sys").modules, f"{kind}.monitor", None)
    with pytest.raises(MissingExtra, match=kind):
        meter(kind)
