"""Attention and recurrences of one pass over many sequences whose keys lie in blocks and whose states lie in slots.

The tokens of all rows are packed into one sequence of N for the matrices. For attention, rows with about as many new
tokens form a bucket; a bucket gathers the blocks of its rows and attends to them at once, or reads them where they are.

Shapes: N packed tokens, R rows of a bucket, T new tokens of its longest row, M blocks of its longest table,
S slots, H query heads, K key heads, D head width.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from layerwise.nets import flex
from layerwise.nets.attend import Pages, Places
from layerwise.nets.flow import Flow, Recurrence
from layerwise.nets.softmax import few_queries, softmax_attention
from layerwise.serve.placed import placed
from layerwise.serve.pool import Pair, Pool
from layerwise.serve.sequence import Row
from layerwise.serve.states import StatePool
from layerwise.serve.table import LayerTable
from layerwise.spec import Attention

FEW = 16
"""Up to this many new tokens of a row, two plain products are faster than the fused kernel on a CPU."""


@dataclass
class Bucket:
    """Rows whose tokens are the packed tokens `tokens`; row r has `sizes[r]` of them, the longest `longest`."""

    rows: list[Row]
    tokens: slice
    device: torch.device

    @cached_property
    def sizes(self) -> list[int]:
        return [row.size for row in self.rows]

    @cached_property
    def longest(self) -> int:
        return max(self.sizes)

    @cached_property
    def places_n(self) -> Tensor | None:
        """Which of R x T places are tokens, in order; None where all are."""
        if min(self.sizes) == self.longest:
            return None
        places = [row * self.longest + token for row, size in enumerate(self.sizes) for token in range(size)]
        return placed(places, self.device)

    def spread(self, x_nHD: Tensor) -> Tensor:
        """The bucket's tokens as [R, H, T, D], places without a token zero."""
        if self.places_n is not None:
            places, x_nHD = len(self.rows) * self.longest, x_nHD.contiguous()
            x_nHD = x_nHD.new_zeros(places, *x_nHD.shape[1:]).index_copy_(0, self.places_n, x_nHD)
        return x_nHD.view(len(self.rows), self.longest, *x_nHD.shape[1:]).transpose(1, 2)

    def packed(self, x_RHTD: Tensor) -> Tensor:
        """The inverse of `spread`, [n, H, D]."""
        x_nHD = x_RHTD.transpose(1, 2).flatten(0, 1)
        return x_nHD if self.places_n is None else x_nHD.index_select(0, self.places_n)


class View:
    """Where the rows of a bucket have their keys in one group, and which of them their tokens see."""

    def __init__(self, bucket: Bucket, group: int, block: int) -> None:
        self.bucket, self.block = bucket, block
        self.tables = [row.sequence.tables[group] for row in bucket.rows]
        self.starts = [row.start - table.shift for row, table in zip(bucket.rows, self.tables, strict=True)]
        self.fresh = len(self.tables) == 1 and self.starts[0] == 0
        self._blocks: flex.Blocks | None = None
        self._masks: dict[int | None, Tensor | None] = {}
        self._seen: dict[int | None, Tensor | None] = {}

    def slots(self) -> list[int]:
        """The slot of every new token in the pool."""
        block, found = self.block, []
        for start, size, table in zip(self.starts, self.bucket.sizes, self.tables, strict=True):
            blocks, first = table.blocks, table.first
            found += [blocks[slot // block - first] * block + slot % block for slot in range(start, start + size)]
        return found

    @cached_property
    def span(self) -> tuple[int, int] | None:
        """Where a single row's slots are consecutive, the first and the one after the last."""
        if len(self.tables) > 1 or not self.tables[0].contiguous():
            return None
        table = self.tables[0]
        first = table.blocks[0] * self.block
        return first, first + self.starts[0] + self.bucket.longest - table.first * self.block

    @cached_property
    def blocks_RM(self) -> Tensor:
        """Block tables, filled up with block 0; only blocks that hold a token or will."""
        longest = max(self._counts)
        filled = [[*table.blocks[:count], *[0] * (longest - count)]
                  for count, table in zip(self._counts, self.tables, strict=True)]
        return placed(filled, self.bucket.device)

    def blocks(self, pool: int) -> flex.Blocks:
        """The same for attention that reads blocks where they are, in pools of `pool` blocks."""
        if self._blocks is None:
            counts_R, first_R = (placed(numbers, self.bucket.device)
                                 for numbers in (self._counts, [table.first for table in self.tables]))
            self._blocks = flex.Blocks.of(self.blocks_RM, counts_R, first_R, self._start_R, pool, self.block)
        return self._blocks

    @cached_property
    def _counts(self) -> list[int]:
        """Blocks of each row that hold a token or will."""
        return [-(-(start + size) // self.block) - table.first
                for start, size, table in zip(self.starts, self.bucket.sizes, self.tables, strict=True)]

    @cached_property
    def _start_R(self) -> Tensor:
        return placed(self.starts, self.bucket.device)

    def mask(self, window: int | None, slots: int) -> Tensor | None:
        """Which of the gathered slots each token sees, bool [R, 1, T, S]; None where causal order says it all."""
        if window not in self._masks:
            self._masks[window] = self._build_mask(window, slots)
        return self._masks[window]

    def seen(self, window: int | None, slots: int, dtype: torch.dtype) -> Tensor | None:
        """The same as numbers to be added to logits; None where every token sees all slots."""
        if window not in self._seen:
            mask = self._build_mask(window, slots, always=self.bucket.longest > 1)
            self._seen[window] = None if mask is None else torch.zeros_like(mask, dtype=dtype).masked_fill_(
                ~mask, float("-inf"))
        return self._seen[window]

    def _build_mask(self, window: int | None, slots: int, always: bool = False) -> Tensor | None:
        if len(self.tables) == 1 and self.span is not None and not always:
            past = self.starts[0] - self.tables[0].first * self.block
            narrow = window is not None and window < slots
            if not narrow and (past == 0 or self.bucket.longest == 1):
                return None
        device = self.bucket.device
        first_R = placed([table.first * self.block for table in self.tables], device)
        slot_RS = first_R[:, None] + torch.arange(slots, device=device)
        query_RT1 = (self._start_R[:, None] + torch.arange(self.bucket.longest, device=device))[..., None]
        seen_RTS = slot_RS[:, None] <= query_RT1
        if window is not None:
            seen_RTS &= slot_RS[:, None] > query_RT1 - window
        return seen_RTS[:, None]


@dataclass(frozen=True)
class Slots:
    """Where the rows of a bucket have their states in one group, which of them begin, and how many tokens each has."""

    slots_R: Tensor
    fresh_R: Tensor | None
    sizes_R: Tensor | None

    @staticmethod
    def of(bucket: Bucket, group: int) -> Slots:
        slots = [row.sequence.tables[group].blocks[0] for row in bucket.rows]
        fresh = [row.start == 0 for row in bucket.rows]
        return Slots(placed(slots, bucket.device), placed(fresh, bucket.device) if any(fresh) else None,
                     None if bucket.places_n is None else placed(bucket.sizes, bucket.device))


@dataclass
class PagedFlow(Flow):
    """A flow over packed rows; keys, values and states go to and come from `pools`, by layer.

    `watched` layers leave the queries of the pass in `queries`, [N, H, D].
    """

    rows: list[Row] = field(default_factory=list)
    table: LayerTable = field(default_factory=lambda: LayerTable((), ()))
    pools: Many[Pool | StatePool | None] = ()
    block: int = 16
    watched: frozenset[int] = frozenset()
    queries: dict[int, Tensor] = field(default_factory=dict)
    _views: dict[int, tuple[list[View], Tensor]] = field(default_factory=dict)
    _slots: dict[int, list[Slots]] = field(default_factory=dict)
    _places: dict[int, Places] = field(default_factory=dict)

    @cached_property
    def buckets(self) -> list[Bucket]:
        """Neighbouring rows of few tokens whose numbers have as many binary digits; every other row by itself."""
        found: list[Bucket] = []
        start, device = 0, self.positions_BT.device
        for row in self.rows:
            stop = start + row.size
            if found and row.size <= FEW and row.size.bit_length() == found[-1].rows[-1].size.bit_length():
                found[-1].rows.append(row)
                found[-1].tokens = slice(found[-1].tokens.start, stop)
            else:
                found.append(Bucket([row], slice(start, stop), device))
            start = stop
        return found

    @cached_property
    def stops(self) -> list[int]:
        """The token after the last of every row."""
        return list(accumulate(row.size for row in self.rows))

    @cached_property
    def wanted_P(self) -> Tensor | None:
        if not any(row.unread for row in self.rows):
            return None
        wanted = [token for stop, row in zip(self.stops, self.rows, strict=True)
                  for token in range(stop - row.size + row.unread, stop)]
        return torch.tensor(wanted, dtype=torch.int64)

    def attend(self, a: Attention, layer: int, q_BHTD: Tensor, k_BKTD: Tensor | None = None,
               v_BKTD: Tensor | None = None) -> Tensor:
        entry = self.table.layers[layer]
        assert entry.group is not None
        pool = self.pools[layer if entry.source is None else entry.source]
        assert isinstance(pool, Pool)
        views, slots_N = self._group(entry.group)
        if layer in self.watched:
            self.queries[layer] = q_BHTD[0].transpose(0, 1)
        fresh: Pair | None = None
        if k_BKTD is not None and v_BKTD is not None:
            fresh = pool.write(slots_N, k_BKTD[0], v_BKTD[0])
        if len(self.rows) == 1:
            return _attend(views[0], pool, q_BHTD, fresh, a)
        q_NHD = q_BHTD[0].transpose(0, 1)
        parts = [view.bucket.packed(_attend(view, pool, view.bucket.spread(q_NHD[view.bucket.tokens]), fresh, a))
                 for view in views]
        out_NHD = parts[0] if len(parts) == 1 else torch.cat(parts)
        return out_NHD.transpose(0, 1)[None]

    def pages(self, a: Attention, layer: int, dtype: torch.dtype) -> Pages | None:
        entry, pool = self.table.layers[layer], self.pools[layer]
        if layer in self.watched or not isinstance(pool, Pool) or pool.dtype != dtype:
            return None
        assert entry.group is not None
        attended = pool.attended(a)
        if attended is None:
            return None
        places = self._places.get(entry.group)
        if places is None:
            places = self._places[entry.group] = self._placed(entry.group)
        rotation = None if a.rope is None else self.rotation(a.rope, int(a.head_dim * a.rope.part))
        return Pages(attended, places, rotation)

    def _placed(self, group: int) -> Places:
        views, slots_N = self._group(group)
        tables = [table for view in views for table in view.tables]
        starts = [start for view in views for start in view.starts]
        row_N = [index for index, row in enumerate(self.rows) for _ in range(row.size)]
        place_N = [start + token for row, start in zip(self.rows, starts, strict=True) for token in range(row.size)]
        longest = max(len(table.blocks) for table in tables)
        blocks_RM = [table.blocks + [0] * (longest - len(table.blocks)) for table in tables]
        stops = self.stops
        alike = sorted(range(len(self.rows)), key=lambda index: tables[index].blocks)
        order_N = [token for index in alike for token in range(stops[index] - self.rows[index].size, stops[index])]
        firsts = [table.first for table in tables]
        return Places(slots_N, *map(torch.tensor, (row_N, place_N, order_N, firsts, blocks_RM)))

    def recur(self, layer: int, advance: Recurrence, u_BTU: Tensor) -> Tensor:
        group, pool = self.table.layers[layer].group, self.pools[layer]
        assert group is not None and isinstance(pool, StatePool)
        if group not in self._slots:
            self._slots[group] = [Slots.of(bucket, group) for bucket in self.buckets]
        parts = []
        for bucket, slots in zip(self.buckets, self._slots[group], strict=True):
            u_RTU = bucket.spread(u_BTU[0, bucket.tokens, None])[:, 0]
            y_RTI, kept = advance(u_RTU, pool.read(slots.slots_R, slots.fresh_R), slots.sizes_R)
            pool.write(slots.slots_R, kept)
            parts.append(bucket.packed(y_RTI[:, None])[:, 0])
        return (parts[0] if len(parts) == 1 else torch.cat(parts))[None]

    def _group(self, group: int) -> tuple[list[View], Tensor]:
        if group not in self._views:
            views = [View(bucket, group, self.block) for bucket in self.buckets]
            slots = [slot for view in views for slot in view.slots()]
            self._views[group] = views, placed(slots, self.positions_BT.device)
        return self._views[group]


def _attend(view: View, pool: Pool, q_RHTD: Tensor, fresh: Pair | None, a: Attention) -> Tensor:
    """What the tokens of one bucket get, [R, H, T, D]; `fresh` are keys and values of the packed tokens, if known."""
    bucket = view.bucket
    if view.fresh and fresh is not None and (a.window is None or a.window >= bucket.longest):
        k, v = (new[None, :, bucket.tokens] for new in fresh)
        return softmax_attention(q_RHTD, k, v, None, a)
    if view.span is None and type(pool) is Pool and flex.runs(a, view.block, q_RHTD.dtype, bucket.device):
        return flex.compiled()(q_RHTD, pool.k, pool.v, view.blocks(pool.k.shape[1] // pool.block), a)
    k, v = pool.span(*view.span) if view.span is not None else pool.gather(view.blocks_RM)
    slots = k.shape[2]
    if bucket.longest <= FEW and (len(bucket.rows) > 1 or bucket.longest > 1) and bucket.device.type == "cpu":
        return few_queries(q_RHTD, k, v, view.seen(a.window, slots, q_RHTD.dtype), a)
    return softmax_attention(q_RHTD, k, v, view.mask(a.window, slots), a)
