"""`layerwise.json`: the hash of every file in a saved folder, so that damage is noticed when it is opened."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from layerwise.errors import BadFile

NAME = "layerwise.json"
ALWAYS = 1 << 30
"""Folders up to this many bytes are hashed whenever they are opened."""


def write(folder: Path, notes: Mapping[str, Any] | None = None) -> None:
    """Record size and SHA-256 of every file in `folder`, beside `notes` about where the model comes from."""
    files = {path.name: {"bytes": path.stat().st_size, "sha256": digest(path)}
             for path in sorted(folder.iterdir())}
    text = json.dumps({"notes": dict(notes or {}), "files": files}, indent=1)
    (folder / NAME).write_text(text + "\n", encoding="utf-8")


def verify(folder: Path, largest: int = ALWAYS) -> None:
    """Compare a folder with its record, if it has one; hashes where all files are at most `largest` bytes.

    Raises BadFile naming the file that is absent, has another size, or another hash.
    """
    if not (folder / NAME).exists():
        return
    try:
        files = json.loads((folder / NAME).read_text(encoding="utf-8"))["files"]
        total = sum(entry["bytes"] for entry in files.values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadFile(f"{folder / NAME} cannot be read: {error}",
                      expected="the record written when the model was saved",
                      do="save the model again, or remove the file to open the folder unchecked") from error
    for name, entry in files.items():
        _verify(folder / name, entry, hashed=total <= largest)


def _verify(path: Path, entry: Mapping[str, Any], hashed: bool) -> None:
    if not path.exists():
        raise BadFile(f"{path.parent} lacks the file {path.name}", expected="every file it was saved with",
                      do="copy the folder again")
    size = path.stat().st_size
    if size != entry["bytes"]:
        what = "truncated" if size < entry["bytes"] else "changed"
        raise BadFile(f"{path} has {size:,} bytes",
                      expected=f"{entry['bytes']:,} bytes, as when it was saved",
                      do=f"it is {what}: copy the folder again")
    if hashed and digest(path) != entry["sha256"]:
        raise BadFile(f"{path} is not what was saved: its SHA-256 differs",
                      expected=f"{entry['sha256'][:16]}...",
                      do=f"copy the folder again; if the change is meant, remove {NAME} beside it")


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
