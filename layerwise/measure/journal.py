"""Results of finished items in a file that survives a kill: one JSON line each, on disk at once."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from layerwise.errors import BadFile


class Journal:
    """Values by key for one `context`, the plain values that results depend on.

    Lines of other contexts in the same file are left alone, as is a line that a kill cut off. Without a path
    values are kept for this run only. Raises BadFile where the file cannot be read or written.
    """

    def __init__(self, path: Path | None, context: Any) -> None:
        self.path = path
        self.context = hashlib.sha256(json.dumps(context, sort_keys=True).encode()).hexdigest()[:16]
        self.values: dict[str, float] = {}
        if path is not None and path.exists():
            self._read(path)

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def __getitem__(self, key: str) -> float:
        return self.values[key]

    def __setitem__(self, key: str, value: float) -> None:
        self.values[key] = value
        if self.path is not None:
            line = json.dumps({"of": self.context, "item": key, "value": value})
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self.path.open("ab") as file:
                    file.write(f"\n{line}".encode())
                    file.flush()
                    os.fsync(file.fileno())
            except OSError as error:
                raise _unusable(self.path, error) from error

    def _read(self, path: Path) -> None:
        try:
            lines = path.read_bytes().split(b"\n")
        except OSError as error:
            raise _unusable(path, error) from error
        for line in lines:
            entry = _entry(line)
            if entry.get("of") == self.context:
                self.values[str(entry["item"])] = float(entry["value"])


def _entry(line: bytes) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except ValueError:
        return {}
    return entry if isinstance(entry, dict) and {"of", "item", "value"} <= set(entry) else {}


def _unusable(path: Path, error: OSError) -> BadFile:
    return BadFile(f"the file of finished measurements {path}: {error}",
                   expected="a file that can be read and written", do="name another file, or make room")
