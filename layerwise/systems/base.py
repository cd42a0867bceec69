"""The contract of a system: `run(size, seed)` returns checks, each a claim beside what was measured.

A system file is the paper's method section as code: a docstring saying what is claimed, from which source,
and which parts are our reading; then `run`. Everything it needs is a library part.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from layerwise.errors import BadOption, UnknownName
from layerwise.systems import SYSTEMS
from layerwise.systems.catalogue import catalogue

Size = Literal["quick", "full"]
SIZES: tuple[Size, ...] = ("quick", "full")


@dataclass(frozen=True)
class Check:
    """One claim of a paper and what was found.

    `measured` and `control` are numbers or small tables of plain values; `holds` is False where the claim
    did not hold here, and None where this size cannot tell; `why` says how it was judged and the likely reason.
    """

    name: str
    claim: str
    measured: Any
    control: Any
    holds: bool | None
    why: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def reproduce(system: str, size: Size = "quick", seed: int = 0) -> list[Check]:
    """Run one system. `quick` takes seconds to a minute, `full` minutes on two cores.

    Raises UnknownName for an id outside the catalogue and BadOption for one that is not done yet.
    """
    if size not in SIZES:
        raise BadOption(f"size {size!r}", expected=f"one of {SIZES}", do="use --size quick or --size full")
    if system not in SYSTEMS:
        if system in catalogue():
            raise BadOption(
                f"the system {system!r}, which is planned but not done",
                expected=f"one of: {', '.join(SYSTEMS)}",
                do="see `layerwise systems` for the states",
            )
        raise UnknownName("system", system, catalogue())
    run: Callable[[Size, int], list[Check]] = SYSTEMS[system]
    return run(size, seed)
