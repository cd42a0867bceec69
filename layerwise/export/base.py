"""What an export is: a model or its plan, written as another tool reads it, or refused with what to allow."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from layerwise.errors import BadOption
from layerwise.export.source import Source
from layerwise.spec import Attention, LayerSpec, StateSpace


@dataclass(frozen=True)
class Allowed:
    """What may happen to a matrix whose format the other tool lacks; nothing by default.

    `requantize` rounds it again, which changes its values; `wider` keeps its values in a type of more bits;
    `dense` stores or leaves it unpacked. Rules and recipes, which describe formats rather than hold them,
    pass over with `dense` what they cannot say.
    """

    requantize: bool = False
    wider: bool = False
    dense: bool = False


NOTHING = Allowed()


@dataclass(frozen=True)
class Written:
    """What was written: where, how many bytes, and what differs from the model that was given."""

    path: Path
    bytes: int
    notes: tuple[str, ...] = ()


class Export(ABC):
    """One target; subclasses are stateless."""

    summary: ClassVar[str]
    """What it writes, in a few words."""
    suffix: ClassVar[str]
    """How the file ends by default; empty for a folder."""

    @abstractmethod
    def write(self, source: Source, output: Path, allowed: Allowed = NOTHING) -> Written:
        """Write `source` to `output`, whole or not at all.

        Raises BadOption naming the first choice that the target cannot express and what to allow.
        """


def refuse(what: str, target: str, can: str, do: str) -> BadOption:
    """The error for a choice that a target cannot express."""
    return BadOption(f"{what}, which {target} cannot express", expected=can, do=do)


def check_rows(rows: tuple[LayerSpec, ...], target: str) -> None:
    """Raises BadOption where a layer has lost a half, shares keys and values with another, has
    a cache of its own precision, or is a state space.
    """
    for layer, row in enumerate(rows):
        if row.mixer is None or row.feed_forward is None:
            half = "attention" if row.mixer is None else "feed-forward"
            raise refuse(f"layer {layer} without its {half} half", target, "layers with both halves",
                         "drop whole layers instead, or keep the model in layerwise's own format")
        if isinstance(row.mixer, StateSpace):
            raise refuse(f"layer {layer}, a state space", target, "layers of attention",
                         "keep the model in layerwise's own format")
        check_keys(layer, row, target)


def check_keys(layer: int, row: LayerSpec, target: str) -> None:
    """Raises BadOption where a layer keeps keys and values otherwise than others do, or none."""
    if not isinstance(row.mixer, Attention):
        return
    if row.mixer.shares is not None:
        raise refuse(f"layer {layer}, which shares keys and values with layer {row.mixer.shares}", target,
                     "layers with keys and values of their own",
                     "make a plan without share-kv, or keep the model in layerwise's own format")
    if row.mixer.cache != "model":
        raise refuse(f"layer {layer}, whose cache holds {row.mixer.cache}", target, "caches in the model's dtype",
                     "make a plan without cache-precision, or keep the model in layerwise's own format")


def names(rows: tuple[LayerSpec, ...], hidden: int) -> Iterator[tuple[int, str, LayerSpec]]:
    """(layer, matrix, row) of every matrix."""
    for layer, row in enumerate(rows):
        for name in row.matrices(hidden):
            yield layer, name, row
