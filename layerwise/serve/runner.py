"""Runs execution plans: packs rows, takes them through their layers, keeps what is on its way, makes logits.

Shapes: N packed tokens, C hidden width, P positions whose logits are wanted, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Many

import torch
from torch import Tensor

from layerwise.nets import flex
from layerwise.serve.paged import PagedFlow
from layerwise.serve.placed import placed
from layerwise.serve.plan import Entry
from layerwise.serve.pool import POOLS, Pool
from layerwise.serve.sequence import Row, Sequence
from layerwise.serve.states import StatePool
from layerwise.serve.table import LayerTable
from layerwise.spec import Attention, StateSpace
from layerwise.stack.decoder import DecoderStack


class Runner:
    """The stack and the tensors of its caches: `blocks` blocks of `block` slots in every group, `states` states.

    Keys and values in the dtype of the model are kept as `kept`, by default that of the stack. `frontiers` holds the
    hidden states of prompts between two spans of layers, by sequence.
    """

    def __init__(self, stack: DecoderStack, table: LayerTable, blocks: int, block: int, states: int = 64,
                 kept: torch.dtype | None = None) -> None:
        self.stack, self.table, self.blocks, self.block, self.kept = stack, table, blocks, block, kept
        self.pools = [self._pool(layer, blocks, states) for layer in range(len(stack))]
        self.frontiers: dict[Sequence, Tensor] = {}
        self._watching: dict[int, PagedFlow] = {}
        self.watched = frozenset(
            layer for group in table.groups if group.scorer == "attention" for layer in group.layers)
        for row in stack.spec.rows:  # kernels are compiled before the first request waits for them
            if isinstance(row.mixer, Attention):
                flex.runs(row.mixer, block, stack.dtype, stack.device)

    def _pool(self, layer: int, blocks: int, states: int) -> Pool | StatePool | None:
        entry, mixer = self.table.layers[layer], self.stack.spec.rows[layer].mixer
        if entry.kind in ("none", "shared"):
            return None
        if isinstance(mixer, StateSpace):
            return StatePool(states, mixer, self.stack.dtype, self.stack.device)
        assert isinstance(mixer, Attention)
        kind = POOLS[entry.precision]
        return kind(blocks, self.block, mixer.kv_heads, mixer.head_dim, self.stack.dtype, self.stack.device,
                    self.kept)

    @torch.inference_mode()
    def run(self, rows: Many[Row], plan: Many[Entry]) -> Tensor:
        """Logits [P, V] of the positions that the rows want, in order; rows whose last layer is not reached wait."""
        hidden: dict[int, Tensor] = {}
        flows: dict[tuple[int, ...], PagedFlow] = {}
        for entry in plan:
            flow = flows.get(entry.rows)
            if flow is None:
                flow = flows[entry.rows] = self._flow([rows[index] for index in entry.rows])
            x_1NC = self._enter(rows, entry, hidden, flow)
            x_1NC = entry.action(self.stack, x_1NC, flow, entry.layers)
            self._watching.update(dict.fromkeys(flow.queries, flow))
            parts = x_1NC.split([rows[index].size for index in entry.rows], 1)
            hidden.update(zip(entry.rows, parts, strict=True))
        parts = [self._leave(row, hidden[index]) for index, row in enumerate(rows)]
        return self.stack.decoder.logits(torch.cat(parts, 1))[0]

    def forget(self, sequences: Iterable[Sequence]) -> None:
        """Let go of what sequences have on its way."""
        for sequence in sequences:
            self.frontiers.pop(sequence, None)

    def queries_of(self, row: Row, layer: int) -> Tensor:
        """The queries of a row in a watched layer, [n, H, D]; only right after the row ran."""
        flow = self._watching[layer]
        start = sum(other.size for other in flow.rows[: flow.rows.index(row)])
        return flow.queries[layer][start : start + row.size]

    def _flow(self, rows: list[Row]) -> PagedFlow:
        positions = [position for row in rows for position in range(row.start, row.start + row.size)]
        return PagedFlow(placed([positions], self.stack.device), dtype=self.stack.dtype, rows=rows, table=self.table,
                         pools=self.pools, block=self.block, watched=self.watched)

    def _enter(self, rows: Many[Row], entry: Entry, hidden: dict[int, Tensor], flow: PagedFlow) -> Tensor:
        """Hidden states of the entry's rows as they enter its first layer, [1, N, C]."""
        if all(index not in hidden and rows[index].layers.start == 0 for index in entry.rows):
            tokens = [token for index in entry.rows for token in rows[index].tokens]
            return self.stack.decoder.embed(placed([tokens], self.stack.device), flow)
        parts = []
        for index in entry.rows:
            row = rows[index]
            if index not in hidden:
                hidden[index] = (self.frontiers.pop(row.sequence) if row.layers.start else
                                 self.stack.decoder.embed(placed([row.tokens], self.stack.device), self._flow([row])))
            parts.append(hidden[index])
        return torch.cat(parts, 1)

    def _leave(self, row: Row, x_1nC: Tensor) -> Tensor:
        """The positions whose logits are wanted, [1, n, C]."""
        if row.layers.stop < len(self.stack):
            self.frontiers[row.sequence] = x_1nC
        return x_1nC[:, row.unread :]
