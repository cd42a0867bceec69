"""What the processor itself counts while something runs: cycles, instructions, misses of the last cache.

Through Linux `perf_event_open`, for this process alone, outside the kernel, over every thread that it has. Most virtual
machines show no hardware counters; what the system counts, time on the processor and page faults, is there anyway.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from functools import cache
from typing import Any

from layerwise.errors import BadOption

HARDWARE, SOFTWARE = 0, 1
EVENTS = {"cycles": (HARDWARE, 0), "instructions": (HARDWARE, 1), "cache-misses": (HARDWARE, 3),
          "nanoseconds": (SOFTWARE, 1), "page-faults": (SOFTWARE, 2)}
"""Type and number of each event in Linux's `perf_event.h`."""
LINE_BYTES = 64
"""What one miss of the last cache fetches from memory."""
_CALLS = {"x86_64": 298, "aarch64": 241}
_ATTRIBUTES, _FLAGS_AT = 128, 40
_FLAGS = 1 << 5 | 1 << 6  # neither the kernel nor a hypervisor
_READ = 8


class Counters:
    """`counts` of the named events over the context, summed over the threads that ran when it was entered.

    Raises BadOption for an event that is unknown, or that this machine does not count.
    """

    def __init__(self, events: Sequence[str]) -> None:
        unknown = [name for name in events if name not in EVENTS]
        if unknown:
            raise BadOption(f"events {unknown}", expected=f"names among {list(EVENTS)}", do="correct the names")
        self.events, self.counts = tuple(events), dict.fromkeys(events, 0)

    def __enter__(self) -> Counters:
        self._open: list[tuple[str, int, int]] = []
        with ExitStack() as inside:
            for thread in map(int, os.listdir("/proc/self/task") if sys.platform == "linux" else [0]):
                for event in self.events:
                    file = _opened(event, thread)
                    inside.callback(os.close, file)
                    self._open.append((event, file, _read(file)))
            self._inside = inside.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        with self._inside:
            self.counts = dict.fromkeys(self.events, 0)
            for event, file, before in self._open:
                self.counts[event] += _read(file) - before


@cache
def counted() -> tuple[str, ...]:
    """The events that this machine counts for this process, none outside Linux."""

    def works(event: str) -> bool:
        try:
            with Counters([event]):
                return True
        except BadOption:
            return False

    return tuple(event for event in EVENTS if works(event))


def _opened(event: str, thread: int) -> int:
    """A file that counts one event of one thread. Raises BadOption where the machine does not."""
    kind, number = EVENTS[event]
    attributes = bytearray(_ATTRIBUTES)
    struct.pack_into("=IIQ", attributes, 0, kind, _ATTRIBUTES, number)
    struct.pack_into("=Q", attributes, _FLAGS_AT, _FLAGS)
    call = _CALLS.get(platform.machine()) if sys.platform == "linux" else None
    file, reason = -1, f"{platform.system()} on {platform.machine()} has no perf_event_open that is known here"
    if call is not None:
        library = ctypes.CDLL(None, use_errno=True)
        file = library.syscall(call, (ctypes.c_char * _ATTRIBUTES).from_buffer(attributes), thread, -1, -1, 0)
        reason = os.strerror(ctypes.get_errno())
    if file < 0:
        raise BadOption(f"counting {event}: {reason}", expected="a machine that lets a process count its own events",
                        do="use a machine with hardware counters, or lower /proc/sys/kernel/perf_event_paranoid to 2")
    return file


def _read(file: int) -> int:
    return int.from_bytes(os.read(file, _READ), sys.byteorder)
