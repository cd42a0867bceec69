"""Works through the lines of a batch: keeps the engine busy, and each answer as soon as it is there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from layerwise.errors import LayerwiseError
from layerwise.serve.batch import Flush, Line, Results, answer, explain, failure
from layerwise.serve.engine import Engine
from layerwise.serve.grouping import ordered
from layerwise.serve.jobs import Jobs
from layerwise.serve.render import Job
from layerwise.serve.request import Completion, Event

Told = Callable[[Line, str | None], None]
LETTERS = 64
"""Beginnings of texts count as equal in steps of this many letters, about a block of tokens."""


def in_groups(lines: Sequence[Line]) -> list[Line]:
    """Lines that begin alike together; groups that may write most for what they read come first (2412.03594)."""
    groups = ordered([line.text for line in lines], [line.tokens for line in lines], LETTERS)
    return [lines[index] for group in groups for index in group.members]


@dataclass
class Open:
    """A line that is being answered: events of each of its requests, and how many are still to end."""

    line: Line
    job: Job
    events: dict[str, list[Event]] = field(default_factory=dict)
    left: int = 0


class Offline:
    """Answers lines with `engine` into `results`; `told` hears of every line that is through, and what was wrong."""

    def __init__(self, engine: Engine, name: str, results: Results, told: Told) -> None:
        self.engine, self.jobs, self.results, self.told = engine, Jobs(engine, name), results, told
        self._open: dict[str, Open] = {}
        self._flush = Flush(results.partial)

    def run(self, lines: Sequence[Line], ahead: int = 128) -> None:
        """Answer the lines that have no answer yet; up to `ahead` requests are in the engine at a time."""
        left = in_groups([line for line in lines if line.id not in self.results.done])
        left.reverse()
        while left or self._open:
            while left and len(self._open) < ahead:
                self._begin(left.pop())
            for event in self.engine.step():
                self._hear(event)

    def _begin(self, line: Line) -> None:
        if line.body is None:
            return self._fail(line, line.wrong)
        started: list[str] = []
        try:
            job = self.jobs.make(line.body)
            for request in job.requests:
                self.engine.add(request)
                started.append(request.id)
        except LayerwiseError as error:
            for id in started:
                self.engine.cancel(id)
            return self._fail(line, explain(error))
        state = Open(line, job, left=len(job.requests))
        self._open.update((request.id, state) for request in job.requests)
        return None

    def _hear(self, event: Event) -> None:
        state = self._open.get(event.id)
        if state is None:
            return
        state.events.setdefault(event.id, []).append(event)
        if event.finish is None:
            return
        del self._open[event.id]
        state.left -= 1
        if state.left == 0:
            self._conclude(state)

    def _conclude(self, state: Open) -> None:
        errors = [event.error for events in state.events.values() for event in events if event.finish == "error"]
        if errors:
            return self._fail(state.line, errors[0] or "the engine failed")
        completions = [Completion.of(request, state.events[request.id]) for request in state.job.requests]
        self._keep(state.line, answer(state.line, state.job, completions))
        return self.told(state.line, None)

    def _fail(self, line: Line, why: str) -> None:
        self._keep(line, failure(line, why))
        self.told(line, why)

    def _keep(self, line: Line, value: dict[str, object]) -> None:
        self.results.add(line.id, value)
        with suppress(OSError):
            self._flush()
