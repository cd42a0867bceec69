"""Files and folders that appear whole or not at all.

Everything is written beside its target under a hidden name, flushed to the disk and then renamed, so a
full disk or a killed process leaves the target as it was. What a killed process left behind is removed
by the next write to the same target.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from layerwise.errors import BadFile


def write_text(path: str | Path, text: str) -> Path:
    """Write UTF-8 `text` to `path`. Raises BadFile, with the target untouched, where it cannot."""
    return write_bytes(path, text.encode())


def write_bytes(path: str | Path, data: bytes) -> Path:
    """Write `data` to `path`. Raises BadFile, with the target untouched, where it cannot."""
    with file(path) as beside:
        beside.write_bytes(data)
    return Path(path)


@contextmanager
def file(target: str | Path) -> Iterator[Path]:
    """Yield a path to write to; on leaving without an error it becomes `target`."""
    target = Path(target)
    with _beside(target) as beside:
        yield beside
        _flush(beside)
        beside.replace(target)
        _flush(target.parent)


@contextmanager
def folder(target: str | Path) -> Iterator[Path]:
    """Yield an empty folder to fill; on leaving without an error it becomes `target`.

    A folder already at `target` is replaced as a whole.
    """
    target = Path(target)
    with _beside(target) as beside:
        beside.mkdir()
        yield beside
        for path in [*sorted(beside.rglob("*")), beside]:
            _flush(path)
        old = beside.with_suffix(".old")
        if target.exists():
            target.rename(old)
        beside.rename(target)
        _flush(target.parent)
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _beside(target: Path) -> Iterator[Path]:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _sweep(target)
        beside = target.parent / f".{target.name}.{os.getpid()}.partial"
        try:
            yield beside
        finally:
            _remove(beside)
    except OSError as error:
        raise BadFile(
            f"cannot write {target}: {error}", expected="a writable place with enough room",
            do="free some room or choose another place; what was there before is unchanged") from error


def _sweep(target: Path) -> None:
    """Remove what dead processes left beside `target`; put back a target they had moved away."""
    for path in sorted(target.parent.iterdir()):
        name, _, kind = path.name.rpartition(".")
        hidden, _, owner = name.rpartition(".")
        ours = hidden == f".{target.name}" and owner.isdigit() and kind in ("partial", "old")
        if not ours or _runs(int(owner)):
            continue
        if kind == "old" and not target.exists():
            path.rename(target)
        else:
            _remove(path)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
