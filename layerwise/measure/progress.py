"""A progress bar on standard error for what takes longer than two seconds."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

PATIENCE = 2.0


class Progress:
    """Counts steps towards `total`; a bar appears after two seconds if `show` and someone is looking."""

    def __init__(self, title: str, total: int, show: bool = True) -> None:
        self.title, self.total, self.show = title, total, show
        self._done, self._began = 0, time.monotonic()
        self._bar: Bar | None = None

    def step(self, count: int = 1) -> None:
        self._done += count
        if self._bar is None and self.show and time.monotonic() - self._began > PATIENCE:
            self._open()
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=self._done)

    def _open(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self.show = (console := Console(stderr=True)).is_terminal
        if self.show:
            columns = TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn()
            self._bar = Progress(*columns, console=console, transient=True)
            self._bar.add_task(self.title, total=self.total)
            self._bar.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()
