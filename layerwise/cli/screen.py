"""What commands print: results on standard output, stages on standard error, and JSON last."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class Screen:
    """With `as_json`, standard output holds the JSON object alone."""

    def __init__(self, as_json: bool) -> None:
        self.as_json, self._began = as_json, time.monotonic()

    def show(self, text: object = "") -> None:
        """Something for people."""
        if not self.as_json:
            print(text, flush=True)

    def tell(self, stage: str) -> None:
        """What is being done now, with the seconds since the start."""
        print(f"[{time.monotonic() - self._began:5.0f} s] {stage}", file=sys.stderr, flush=True)

    @contextmanager
    def resumable(self) -> Iterator[None]:
        """Say that an interrupted command can go on."""
        try:
            yield
        except KeyboardInterrupt:
            self.tell("interrupted; the same command goes on from here")
            raise

    def finish(self, value: dict[str, Any]) -> None:
        """The JSON object, where one is asked for; always the last line."""
        if self.as_json:
            sys.stderr.flush()
            print(json.dumps(value, allow_nan=False, default=_plain), flush=True)


def columns(table: Sequence[Sequence[str]]) -> str:
    """A left-aligned text table; the first row is the heading."""
    widths = [max(len(row[place]) for row in table) for place in range(len(table[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table
    )


def _plain(value: object) -> str:
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} is not plain")
