"""Requests that arrive over time, on a clock of one's own: what each waits for its first and for its next tokens.

The clock moves by what a step is said to take, so that a schedule can be judged by a model of a machine, and again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from layerwise.serve.engine import Engine
from layerwise.serve.request import Request


@dataclass
class Served:
    """One request: when it came, its tokens, and when each was there."""

    arrival: float
    tokens: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)

    @property
    def first(self) -> float:
        """Time to the first token."""
        return self.times[0] - self.arrival

    @property
    def whole(self) -> float:
        """Time to the last token."""
        return self.times[-1] - self.arrival

    @property
    def gaps(self) -> list[float]:
        """Times between tokens."""
        return [after - before for before, after in zip(self.times, self.times[1:], strict=False)]


def replay(engine: Engine, requests: Sequence[Request], arrivals: Sequence[float], seconds: Callable[[], float]
           ) -> list[Served]:
    """Serve requests that arrive at ascending times; `seconds`, asked after each step, says how long it took."""
    served = {request.id: Served(arrival) for request, arrival in zip(requests, arrivals, strict=True)}
    left = list(zip(requests, arrivals, strict=True))[::-1]
    now = 0.0
    while left or engine.busy:
        if not engine.busy:
            now = max(now, left[-1][1])
        while left and left[-1][1] <= now:
            engine.add(left.pop()[0])
        events = engine.step()
        now += seconds()
        for event in events:
            one = served[event.id]
            one.tokens += event.tokens
            one.times += [now] * len(event.tokens)
    return list(served.values())
