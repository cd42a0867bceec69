"""What a checkpoint is: named tensors whose shapes are known before any of their bytes are read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from layerwise.errors import BadFile


class Checkpoint(ABC):
    """Named tensors in files. Nothing is read until a tensor is touched; every tensor may be written to."""

    place: Path
    """The file or folder, for messages."""

    @abstractmethod
    def names(self) -> frozenset[str]:
        """Every tensor's name."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, without reading it."""

    @abstractmethod
    def dtype(self, name: str) -> torch.dtype:
        """The dtype that `tensors` returns it in."""

    @abstractmethod
    def tensors(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Several tensors at once. Raises BadFile for a name that is not there."""

    def tensor(self, name: str) -> Tensor:
        """One tensor. Raises BadFile where it is not there."""
        return self.tensors([name])[name]


class Renamed(Checkpoint):
    """A checkpoint seen under other names: `rename` maps the new name to the stored one."""

    def __init__(self, checkpoint: Checkpoint, rename: Callable[[str], str], names: Iterable[str]) -> None:
        self.place = checkpoint.place
        self._checkpoint = checkpoint
        stored = checkpoint.names()
        self._stored = {name: rename(name) for name in names if rename(name) in stored}

    def names(self) -> frozenset[str]:
        return frozenset(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._checkpoint.shape(self._known(name))

    def dtype(self, name: str) -> torch.dtype:
        return self._checkpoint.dtype(self._known(name))

    def tensors(self, names: Iterable[str]) -> dict[str, Tensor]:
        wanted = {name: self._known(name) for name in names}
        found = self._checkpoint.tensors(wanted.values())
        return {name: found[stored] for name, stored in wanted.items()}

    def _known(self, name: str) -> str:
        if name not in self._stored:
            raise missing(name, self)
        return self._stored[name]


def missing(name: str, checkpoint: Checkpoint) -> BadFile:
    """The error for a tensor that a checkpoint lacks."""
    return BadFile(f"{checkpoint.place} has no tensor {name}",
                   expected=f"every tensor of its configuration; it holds {len(checkpoint.names())} others",
                   do="fetch the folder again, or correct config.json if it belongs to another model")
