"""Memory that is not needed soon, given back to the system: of mapped files, and what was freed in pieces."""

from __future__ import annotations

import ctypes
import mmap
import sys
from bisect import bisect_right
from collections.abc import Iterable

from torch import Tensor

PAGEOUT = 21
"""MADV_PAGEOUT of Linux 5.4 and later."""


def let_go(tensors: Iterable[Tensor]) -> None:
    """Free the memory of tensors that are views of mapped files.

    Their numbers stay what they are: whoever reads them again reads the file. Other tensors, and systems that are not
    Linux, are left alone.
    """
    if not sys.platform.startswith("linux"):
        return
    mapped = _mapped()
    starts = [start for start, _ in mapped]
    advise = ctypes.CDLL(None, use_errno=True).madvise
    advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for tensor in tensors:
        if tensor.device.type != "cpu" or not tensor.is_contiguous():
            continue
        start, stop = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        at = bisect_right(starts, start) - 1
        if at >= 0 and stop <= mapped[at][1]:
            first, last = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, stop // mmap.PAGESIZE * mmap.PAGESIZE
            if last > first:
                advise(first, last - first, PAGEOUT)


def trim() -> None:
    """Free what the C library keeps of memory that was freed: between tensors of many sizes hundreds of megabytes stay.

    Only that of GNU can be asked; elsewhere nothing happens.
    """
    if sys.platform.startswith("linux"):
        ask = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if ask is not None:
            ask(ctypes.c_size_t(0))


def _mapped() -> list[tuple[int, int]]:
    """Addresses of this process that are views of files, in order."""
    found = []
    with open("/proc/self/maps") as lines:
        for line in lines:
            span, _, _, _, inode, *path = line.split(maxsplit=5)
            if inode != "0" and path:
                start, stop = (int(end, 16) for end in span.split("-"))
                found.append((start, stop))
    return found
