"""Blocks of a cache: which are free, and how many hold each of the others. Bookkeeping only, no tensors."""

from __future__ import annotations

import heapq
from collections.abc import Iterable


class BlockPool:
    """`count` blocks, numbered from 0; a block is free when nobody holds it."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.holders = [0] * count
        self.free = count
        self._heap = list(range(count))
        self._listed = [True] * count

    def take(self, after: int | None = None) -> int:
        """A free block, now held once: the one next to `after` where it is free, so that runs stay contiguous.

        Raises IndexError where none is free.
        """
        wanted = -1 if after is None else after + 1
        if not (0 <= wanted < self.count and self.holders[wanted] == 0):
            wanted = self._lowest()
        self.holders[wanted] = 1
        self.free -= 1
        return wanted

    def hold(self, block: int) -> None:
        """One more holder of a block that is held already."""
        assert self.holders[block] > 0, f"block {block} is free"
        self.holders[block] += 1

    def release(self, block: int) -> None:
        """One holder less; the last one frees the block."""
        assert self.holders[block] > 0, f"block {block} is free"
        self.holders[block] -= 1
        if self.holders[block] == 0:
            self.free += 1
            if not self._listed[block]:
                self._listed[block] = True
                heapq.heappush(self._heap, block)

    def check(self, held: Iterable[int]) -> None:
        """Assert that `held`, every block once for each of its holders, is all that is not free."""
        counted = [0] * self.count
        for block in held:
            counted[block] += 1
        assert counted == self.holders, "holders differ from the tables that name the blocks"
        assert self.free == counted.count(0), "free and used blocks are not all blocks"

    def _lowest(self) -> int:
        while True:
            block = heapq.heappop(self._heap)
            self._listed[block] = False
            if self.holders[block] == 0:
                return block
