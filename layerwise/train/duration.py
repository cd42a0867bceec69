"""How long to train, in words: `10m`, `90s`, `1h` or `200steps`."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from layerwise.errors import BadOption

SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0}
_WORDS = re.compile(r"(\d+(?:\.\d+)?) ?(s|m|h|steps?)")


@dataclass(frozen=True)
class Duration:
    """A number of steps or of seconds; the other is None."""

    steps: int | None = None
    seconds: float | None = None

    @staticmethod
    def parse(text: str) -> Duration:
        """`10m`, `90s`, `1h`, `1.5h`, `200steps`. Raises BadOption for anything else, and for nothing at all."""
        match = _WORDS.fullmatch(text.strip().lower())
        amount, unit = (float(match[1]), match[2]) if match else (0.0, "")
        if unit.startswith("step") and amount >= 1 and amount == math.floor(amount):
            return Duration(steps=int(amount))
        if unit in SECONDS and amount > 0:
            return Duration(seconds=amount * SECONDS[unit])
        raise BadOption(f"training for {text!r}", expected="a time or a number of steps",
                        do="write for instance 10m, 90s, 1h or 200steps")

    def __str__(self) -> str:
        if self.steps is not None:
            return f"{self.steps} steps"
        assert self.seconds is not None
        return f"{self.seconds / 60:g} minutes" if self.seconds >= 60 else f"{self.seconds:g} seconds"
