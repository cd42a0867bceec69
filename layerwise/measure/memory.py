"""Running out of memory as an error that says what to leave out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from layerwise.errors import BadOption
from layerwise.stack.base import Stack
from layerwise.stack.decoder import DecoderStack

SIGNS = ("can't allocate memory", "cannot allocate memory", "out of memory", "not enough memory")
"""What allocators say when they give up; torch has a class of its own for accelerators only."""


def out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in SIGNS)


@contextmanager
def enough_memory(stack: Stack, doing: str, drop: str = "") -> Iterator[None]:
    """Errors of allocation while `doing` something become one that says what to drop, or how to stream.

    `drop` names the instrument at fault where it is known. Raises BadOption; other errors pass.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        ways = [f"leave out {drop}"] if drop else []
        ways.append("give fewer rows at once (batch=1) or shorter ones")
        if isinstance(stack, DecoderStack) and not stack.streamed:
            ways.append("read layers from disk as they run, open(..., stream=True)")
        raise BadOption(f"memory ran out while {doing} of {stack.name}",
                        expected="memory for one batch beside the model", do="; or ".join(ways)) from error
