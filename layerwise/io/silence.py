"""Silence of compiled libraries that print on standard output, which may be read by another program."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def silent() -> Iterator[None]:
    """While the context lasts nothing that is written to standard output gets there, whoever writes it.

    Where a process has no standard output, nothing changes.
    """
    try:
        sys.stdout.flush()
        kept = os.dup(1)
    except (AttributeError, OSError, ValueError):  # sys.stdout is None where there was none from the start
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        if sys.platform != "win32":
            ctypes.CDLL(None).fflush(None)  # or what C has buffered comes out later
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)
