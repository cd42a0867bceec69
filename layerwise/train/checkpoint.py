"""Where a training stands, on disk: safetensors for numbers, JSON for the rest, no pickle.

A folder holds `state.json` and the folder of tensors that it names. Tensors are written first and `state.json` is
renamed into place last, so whatever moment a kill comes at, one whole state is there.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from layerwise.errors import BadFile, BadOption
from layerwise.io import atomic, safetensors

EVERY = 60.0
"""Seconds between states, at least."""

SHARE = 0.05
"""Of the time, at most this much goes into writing states."""


@dataclass(frozen=True)
class Saved:
    """Tensors by name, and plain JSON values."""

    tensors: Mapping[str, Tensor]
    values: Mapping[str, Any]


class Checkpoint:
    """The newest state of one training in `folder`; `identity` says which training it is.

    With `end` the last state is saved too, for a training that others follow.
    """

    def __init__(self, folder: str | Path, identity: str, every: float = EVERY, *, end: bool = False) -> None:
        self.folder, self.identity, self.every, self.end = Path(folder), identity, every, end
        self._next = time.monotonic() + every

    def load(self) -> Saved | None:
        """The state, or None where there is none. Raises BadOption for another training's, BadFile for damage."""
        path = self.folder / "state.json"
        if not path.exists():
            return None
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            identity, tensors = values.pop("identity"), self.folder / values.pop("tensors")
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise BadFile(f"the training state in {path}: {error}", expected="a file this library wrote",
                          do="remove the folder to train from the start") from error
        if identity != self.identity:
            raise BadOption(f"the training state in {self.folder}, which is that of another training",
                            expected="the same model, text, method and budget",
                            do="remove the folder, or choose another")
        stored = safetensors.SafetensorsCheckpoint(tensors)
        return Saved(stored.tensors(sorted(stored.names())), values)

    def due(self, ended: bool = False) -> bool:
        """Whether it is time to save; `ended` says that this is the last state."""
        return time.monotonic() >= self._next or (ended and self.end)

    def save(self, state: Saved) -> None:
        """Replace the state. Raises BadFile, with the one before still there, where the disk is full."""
        began = time.monotonic()
        before = sorted(path for path in self.folder.glob("state-*"))
        name = f"state-{max((int(path.name.partition('-')[2]) for path in before), default=0) + 1}"
        with atomic.folder(self.folder / name) as beside:
            tensors = {name: tensor.detach().cpu() for name, tensor in state.tensors.items()}
            safetensors.write(beside / "model.safetensors", tensors)
        values = {"identity": self.identity, "tensors": name, **state.values}
        atomic.write_text(self.folder / "state.json", json.dumps(values) + "\n")
        for path in before:
            shutil.rmtree(path, ignore_errors=True)
        now = time.monotonic()
        self._next = now + max(self.every, (now - began) / SHARE)

    def remove(self) -> None:
        """Take the whole folder away."""
        shutil.rmtree(self.folder, ignore_errors=True)


def digest(*parts: object) -> str:
    """A name for what these are: tensors by their numbers, other things by their `repr`."""
    found = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            numbers = part.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            part = tuple(part.shape), hashlib.sha256(numbers).hexdigest()
        found.update(repr(part).encode() + b"\0")
    return found.hexdigest()[:16]
