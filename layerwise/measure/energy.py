"""Joules of whatever runs: from a meter where the machine has one, from a stated model of power otherwise.

Looked for in this order: the processor's own energy counters (Linux `powercap`), an accelerator's counter through
`zeus`, `codecarbon`'s estimate where it is asked for, and a model: watts of a busy core times the processor time
that was used. What a meter reads includes idle power, which is subtracted; what a model says is called modelled
wherever it is shown, and differs between two pieces of work only as their times do.
"""

from __future__ import annotations

import importlib.util
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from layerwise.errors import BadOption, MissingExtra

POWERCAP = Path("/sys/class/powercap")
WATTS = 4.0
"""Modelled power of one busy core, W: a usual server processor's design power over its cores."""

Kind = Literal["auto", "rapl", "zeus", "codecarbon", "model"]


@dataclass(frozen=True)
class Spent:
    """Joules and seconds of one piece of work; `modelled` where no meter saw it."""

    joules: float
    seconds: float
    modelled: bool


class Meter(ABC):
    """Books the energy of a call. `idle` watts are subtracted from what a counter reads."""

    name: str
    modelled: bool = False
    idle: float = 0.0

    def spent(self, work: Callable[[], object]) -> Spent:
        """Run `work` once."""
        start = time.perf_counter()
        joules = self.joules(work)
        seconds = time.perf_counter() - start
        return Spent(max(0.0, joules - self.idle * seconds), seconds, self.modelled)

    def rest(self, seconds: float = 30.0) -> float:
        """Measure idle power over `seconds` of doing nothing, subtract it from now on, and return it, W."""
        if not self.modelled:
            start = time.perf_counter()
            joules = self.joules(lambda: time.sleep(seconds))
            self.idle = joules / (time.perf_counter() - start)
        return self.idle

    @abstractmethod
    def joules(self, work: Callable[[], object]) -> float:
        """Energy while `work` runs, idle power included."""


class Modelled(Meter):
    """`watts` for every second of processor time."""

    name, modelled = "model", True

    def __init__(self, watts: float = WATTS) -> None:
        self.watts = watts

    def joules(self, work: Callable[[], object]) -> float:
        start = time.process_time()
        work()
        return self.watts * (time.process_time() - start)


class Rapl(Meter):
    """The processor's counters: packages and memory, in microjoules that wrap around."""

    name = "rapl"

    def __init__(self, folder: Path = POWERCAP) -> None:
        self.zones = counters(folder)

    def joules(self, work: Callable[[], object]) -> float:
        before = [int((zone / "energy_uj").read_text()) for zone in self.zones]
        work()
        after = [int((zone / "energy_uj").read_text()) for zone in self.zones]
        wraps = [int((zone / "max_energy_range_uj").read_text()) for zone in self.zones]
        return sum((b - a) % wrap for a, b, wrap in zip(before, after, wraps, strict=True)) / 1e6


class Zeus(Meter):
    """Accelerator counters through the package `zeus`. Raises MissingExtra without it."""

    name = "zeus"

    def __init__(self) -> None:
        try:
            from zeus.monitor import ZeusMonitor
        except ImportError as error:
            raise MissingExtra("zeus", "energy", "reading an accelerator's energy counter") from error
        self.monitor: Any = ZeusMonitor()

    def joules(self, work: Callable[[], object]) -> float:
        self.monitor.begin_window("layerwise")
        work()
        found = self.monitor.end_window("layerwise")
        return float(found.total_energy)


class CodeCarbon(Meter):
    """codecarbon's estimate from the processor's design power and load: a model, as it says itself."""

    name, modelled = "codecarbon", True

    def __init__(self) -> None:
        try:
            from codecarbon import OfflineEmissionsTracker
        except ImportError as error:
            raise MissingExtra("codecarbon", "energy", "estimating energy") from error
        self.tracker: Any = OfflineEmissionsTracker

    def joules(self, work: Callable[[], object]) -> float:
        tracker = self.tracker(country_iso_code="USA", save_to_file=False, log_level="error")
        tracker.start()
        try:
            work()
        finally:
            tracker.stop()
        return float(tracker.final_emissions_data.energy_consumed) * 3.6e6


def counters(folder: Path = POWERCAP) -> list[Path]:
    """Readable energy zones that do not hold one another's energy: packages, and memory inside them."""
    zones = []
    for zone in sorted(folder.glob("*:*")):
        try:
            int((zone / "energy_uj").read_text())
            name = (zone / "name").read_text().strip()
        except (OSError, ValueError):
            continue
        if name.startswith(("package", "dram")):
            zones.append(zone)
    return zones


def meter(kind: Kind = "auto") -> Meter:
    """The best meter here, or the one that is named. Raises BadOption where its counter is not there."""
    if kind == "auto":
        import torch

        if torch.cuda.is_available() and importlib.util.find_spec("zeus"):
            return Zeus()
        return Rapl() if counters() else Modelled()
    if kind == "rapl" and not counters():
        raise BadOption("the meter 'rapl', but no energy counter can be read",
                        expected=f"readable files {POWERCAP}/*/energy_uj", do="use 'model', or run with access to them")
    kinds: dict[str, Callable[[], Meter]] = {
        "rapl": Rapl, "zeus": Zeus, "codecarbon": CodeCarbon, "model": Modelled}
    if kind not in kinds:
        raise BadOption(f"the meter {kind!r}", expected=f"auto or one of {', '.join(kinds)}", do="use 'auto'")
    return kinds[kind]()
