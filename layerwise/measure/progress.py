"""Progress on standard error: a bar where someone is looking, else a line a minute."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

PATIENCE = 2.0
LINES_EVERY = 60.0
"""Seconds between two lines of a log."""


class Progress:
    """Counts steps towards `total`; with `show`, a bar appears after two seconds, or in a file a line a minute."""

    def __init__(self, title: str, total: int, show: bool = True) -> None:
        self.title, self.total, self.show = title, total, show
        self._done, self._began = 0, time.monotonic()
        self._told = self._began
        self._bar: Bar | None = None

    def step(self, count: int = 1) -> None:
        self._done += count
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=self._done)
        elif self.show and now - self._began > PATIENCE and not self._open() and now - self._told >= LINES_EVERY:
            self._told = now
            self._tell(now - self._began)

    def _tell(self, seconds: float) -> None:
        done = min(self._done, self.total)
        left = f", about {seconds * (self.total - done) / done / 60:.0f} min left" if done else ""
        print(f"{self.title}: {done / max(1, self.total):.0%} after {seconds / 60:.0f} min{left}", file=sys.stderr,
              flush=True)

    def _open(self) -> bool:
        """Begin the bar, if someone is looking."""
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        if not console.is_terminal:
            return False
        columns = TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn()
        self._bar = Progress(*columns, console=console, transient=True)
        self._bar.add_task(self.title, total=self.total, completed=self._done)
        self._bar.start()
        return True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()
