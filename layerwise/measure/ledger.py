"""What a model costs over its whole life: search, training, compression, and every query that it serves.

Source: the full-cycle metric of arXiv 2108.13465, as reconstructed: for n lifetime queries
E(n) = E_search + E_train + E_compress + n e_query, and the score G(n) = (accuracy - floor) / E(n). Two models
break even at n* = (E_b - E_a) / (e_a - e_b).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from layerwise.errors import BadOption
from layerwise.measure.energy import Meter, Spent
from layerwise.measure.traffic import Traffic

STAGES = ("search", "train", "compress")
T = TypeVar("T")


@dataclass(frozen=True)
class Booked:
    """One entry: which stage it belongs to, what it was for, and what it took."""

    stage: str
    what: str
    spent: Spent
    operations: float = 0.0
    moved: float = 0.0


@dataclass
class Ledger:
    """Entries by stage, and the energy of one query. Reused entries (a teacher, a base model) can be carried over."""

    name: str
    entries: list[Booked] = field(default_factory=list)
    query: float = math.nan
    modelled: bool = False

    def book(self, stage: str, what: str, meter: Meter, work: Callable[[], T], *, count: bool = False) -> T:
        """Run `work`, book what it took, and return its result; `count` its operations and bytes as well.

        Counting slows the work down, so energy and counts should not be taken from the same run where work is
        short. Raises BadOption for an unknown stage.
        """
        if stage not in STAGES:
            raise BadOption(f"the stage {stage!r}", expected=f"one of {', '.join(STAGES)}",
                            do="book queries with `serve`")
        results: list[T] = []
        traffic = Traffic()
        if count:
            with traffic:
                spent = meter.spent(lambda: results.append(work()))
        else:
            spent = meter.spent(lambda: results.append(work()))
        self.entries.append(Booked(stage, what, spent, traffic.operations, traffic.moved))
        self.modelled |= spent.modelled
        return results[0]

    def serve(self, meter: Meter, work: Callable[[], object], queries: int, *, seconds: float = 1.0,
              repeats: int = 3) -> float:
        """Joules per query of `work`, which answers `queries`: median of `repeats` loops of about `seconds` each."""
        work()
        once = meter.spent(work).seconds
        loops = max(1, round(seconds / max(once, 1e-6)))

        def loop() -> None:
            for _ in range(loops):
                work()

        spent = [meter.spent(loop) for _ in range(repeats)]
        self.modelled |= any(one.modelled for one in spent)
        self.query = statistics.median(one.joules for one in spent) / (loops * queries)
        return self.query

    def carried(self, name: str, share: float = 1.0) -> Ledger:
        """A new ledger that owes `share` of what is booked here: compressing pays for what it starts from."""
        scaled = [replace(entry, spent=replace(entry.spent, joules=share * entry.spent.joules,
                                               seconds=share * entry.spent.seconds),
                          operations=share * entry.operations, moved=share * entry.moved)
                  for entry in self.entries]
        return Ledger(name, scaled, modelled=self.modelled)

    def stages(self) -> dict[str, float]:
        """Joules by stage."""
        return {stage: sum(entry.spent.joules for entry in self.entries if entry.stage == stage) for stage in STAGES}

    @property
    def development(self) -> float:
        """Joules before the first query."""
        return sum(self.stages().values())

    def total(self, queries: float) -> float:
        """Joules over a life of so many queries."""
        return self.development + queries * self.query


def break_even(a: Ledger, b: Ledger) -> float:
    """Queries from which on `b` has cost less than `a`; 0 if always, inf if never."""
    dearer, saved = b.development - a.development, a.query - b.query
    if saved <= 0:
        return math.inf if dearer > 0 or saved < 0 else 0.0
    return max(0.0, dearer / saved)


def ranking(ledgers: Sequence[Ledger], accuracy: Mapping[str, float], floor: float, queries: float) -> list[str]:
    """Names by (accuracy - floor) / E(queries), the best first."""
    scores = {ledger.name: (accuracy[ledger.name] - floor) / ledger.total(queries) for ledger in ledgers}
    return sorted(scores, key=lambda name: -scores[name])


def carbon(joules: float, grams_per_kilowatt_hour: float) -> float:
    """Grams of carbon dioxide of so much energy from a grid of that intensity."""
    return joules / 3.6e6 * grams_per_kilowatt_hour
