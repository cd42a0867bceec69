"""The blocks of all sequences in all groups: reserving, sharing prefixes, letting go. No tensors.

Slots and positions are explained in `BlockTable`; groups in `LayerTable`.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from itertools import chain

from layerwise.serve.blocks import BlockPool
from layerwise.serve.prefix import Eviction, Node, PrefixTree, recency
from layerwise.serve.sequence import BlockTable, Sequence
from layerwise.serve.table import LayerTable


class Caches:
    """`blocks` blocks of `block` tokens for each group of `table`, or `states` states where it is recurrent.

    `share` keeps prefixes for later requests. Budgets keep what this prompt needs, and states are not kept where a
    prefix ends, so with either no prefix is shared.
    """

    def __init__(self, table: LayerTable, blocks: int, block: int, *, share: bool = True,
                 eviction: Eviction = recency, states: int = 64) -> None:
        self.table, self.block = table, block
        self.pools = [BlockPool(states if group.kind == "recurrent" else blocks) for group in table.groups]
        share = share and bool(table.groups) and not table.has_budgets and not table.is_recurrent
        self.tree = PrefixTree(self.pools, block, eviction) if share else None

    @property
    def capacity(self) -> int:
        """Tokens that one sequence may have."""
        counts = [pool.count for pool, group in zip(self.pools, self.table.groups, strict=True)
                  if group.kind != "recurrent"]
        return counts[0] * self.block if counts else 1 << 30

    def tables(self) -> list[BlockTable]:
        return [BlockTable() for _ in self.pools]

    # joining -------------------------------------------------------------------------------------

    def pending(self, sequence: Sequence, running: Many[Sequence]) -> bool:
        """Whether another sequence computes the block that this one needs first."""
        if self.tree is None or sequence.request.params.prompt_logprobs:
            return False
        path = self.tree.match(sequence.tokens)
        node, start = path[-1] if path else self.tree.root, len(path) * self.block
        if start + self.block >= len(sequence.tokens):
            return False
        wanted = sequence.tokens[start : start + self.block]
        return any(other.node is node and other.computed < self._publishable(other)
                   and other.tokens[start : start + self.block] == wanted for other in running)

    def admit(self, sequence: Sequence, running: Many[Sequence], promise: bool = False) -> bool:
        """Give the sequence the prefix that is known, if there is room for the rest of its tokens; whether there is.

        Blocks that those running still need for their own tokens are not room; with `promise`, tokens count that are
        still to be written. A prompt that is scored is computed whole, since a cached prefix has no logits.
        """
        scored = sequence.request.params.prompt_logprobs
        path = self.tree.match(sequence.tokens) if self.tree and not scored else []
        hit = len(path) * self.block
        sequence.tables = self.tables()
        if self.tree is not None:
            self.tree.touch(path)
            self._go_on(sequence, path[-1] if path else self.tree.root)
        for group, pool in enumerate(self.pools):
            sequence.tables[group].first = skipped = self._let_go(group, hit)
            for node in path[skipped:]:
                pool.hold(node.blocks[group])
                sequence.tables[group].blocks.append(node.blocks[group])
        sequence.computed = sequence.cached = hit
        promised = [sum(self._missing(other, _end(other, promise))[group] for other in running)
                    for group in range(len(self.pools))]
        needed = self._missing(sequence, _end(sequence, promise))
        if all(self._free(group, needed[group] + more) for group, more in enumerate(promised)):
            return True
        self.drop(sequence)
        sequence.computed = sequence.cached = 0
        return False

    def reserve(self, sequence: Sequence, end: int) -> bool:
        """Blocks for all tokens before position `end`; False where there are too few, and nothing is changed."""
        missing = self._missing(sequence, end)
        if not all(self._free(group, count) for group, count in enumerate(missing)):
            return False
        for pool, table, count in zip(self.pools, sequence.tables, missing, strict=True):
            for _ in range(count):
                table.blocks.append(pool.take(table.blocks[-1] if table.blocks else None))
        return True

    def _missing(self, sequence: Sequence, end: int) -> list[int]:
        """Blocks of each group that tokens before position `end` still lack; a state is one block for all tokens."""
        return [int(not table.blocks) if group.kind == "recurrent" else
                max(0, -(-(end - table.shift - table.end(self.block)) // self.block))
                for group, table in zip(self.table.groups, sequence.tables, strict=True)]

    def _free(self, group: int, count: int) -> bool:
        """Whether `count` blocks are free, after evicting prefixes where that helps."""
        pool = self.pools[group]
        return pool.free >= count or (self.tree is not None and self.tree.evict(group, count))

    # moving on -----------------------------------------------------------------------------------

    def settle(self, sequence: Sequence) -> None:
        """Publish blocks that are whole in every layer, then let go of those no later token looks at."""
        if self.tree is not None:
            self._publish(sequence)
        for group, table in enumerate(sequence.tables):
            keep = self._let_go(group, sequence.computed)
            while table.first < keep and table.blocks:
                self.pools[group].release(table.blocks.pop(0))
                table.first += 1

    def compact(self, sequence: Sequence, group: int, kept: list[int]) -> None:
        """Keep only the slots `kept` (ascending) of a group, which were moved to the front."""
        table, pool = sequence.tables[group], self.pools[group]
        total = sequence.computed - table.shift
        table.kept = [self.position(table, slot) for slot in kept]
        table.shift += total - len(kept)
        while table.end(self.block) - self.block >= len(kept) and table.blocks:
            pool.release(table.blocks.pop())

    @staticmethod
    def position(table: BlockTable, slot: int) -> int:
        """The position of the token in a slot."""
        return table.kept[slot] if slot < len(table.kept) else slot + table.shift

    def drop(self, sequence: Sequence) -> None:
        """Give all blocks of a sequence back."""
        for pool, table in zip(self.pools, sequence.tables, strict=True):
            for block in reversed(table.blocks):
                pool.release(block)
        sequence.tables = self.tables()
        self._go_on(sequence, None)

    def _publishable(self, sequence: Sequence) -> int:
        """Tokens that later requests may use; those that left layers out are of no use to a prompt."""
        return sequence.prompt if self.table.skipped else len(sequence.tokens)

    def _publish(self, sequence: Sequence) -> None:
        node, block = sequence.node, self.block
        assert node is not None and self.tree is not None
        last = min(sequence.computed, self._publishable(sequence)) // block
        for index in range(node.depth, last):
            tokens = tuple(sequence.tokens[index * block : (index + 1) * block])
            own = tuple(table.blocks[index - table.first] for table in sequence.tables)
            node = self.tree.insert(node, tokens, own)
            self._adopt(sequence, index, node)
        self._go_on(sequence, node)

    def _adopt(self, sequence: Sequence, index: int, node: Node) -> None:
        """Use the blocks of a node that another sequence published first."""
        for pool, table, block in zip(self.pools, sequence.tables, node.blocks, strict=True):
            own = table.blocks[index - table.first]
            if own != block:
                pool.hold(block)
                table.blocks[index - table.first] = block
                pool.release(own)

    def _go_on(self, sequence: Sequence, node: Node | None) -> None:
        if sequence.node is not None:
            sequence.node.users -= 1
        if node is not None:
            node.users += 1
        sequence.node = node

    def _let_go(self, group: int, computed: int) -> int:
        """Blocks at the beginning that no token from `computed` on looks at."""
        entry = self.table.groups[group]
        if entry.kind != "window":
            return 0
        assert entry.tokens is not None
        return max(0, computed - entry.tokens + 1) // self.block

    # checking ------------------------------------------------------------------------------------

    def check(self, running: Many[Sequence]) -> None:
        """Assert that every block is free or held as often as tables and tree say, and slots are not shared."""
        for group, pool in enumerate(self.pools):
            tables = [sequence.tables[group] for sequence in running]
            pool.check(chain(*(table.blocks for table in tables), self.tree.held(group) if self.tree else ()))
            for sequence, table in zip(running, tables, strict=True):
                self._check_table(sequence, group, table)
        if self.tree is not None:
            self.tree.check()
            users = [sequence.node for sequence in running if sequence.node is not None]
            for node in (self.tree.root, *self.tree.nodes()):
                assert node.users == users.count(node), "a node has users that do not run"

    def _check_table(self, sequence: Sequence, group: int, table: BlockTable) -> None:
        assert len(set(table.blocks)) == len(table.blocks), "a sequence holds a block twice"
        if self.table.groups[group].kind == "recurrent":
            assert len(table.blocks) <= 1, "a sequence holds several states"
            assert table.blocks or not sequence.computed, "computed tokens have no state"
            assert all(self.pools[group].holders[block] == 1 for block in table.blocks), "sequences share a state"
            return
        assert table.end(self.block) >= sequence.computed - table.shift, "computed tokens have no slot"
        assert table.first <= self._let_go(group, sequence.computed), "a block was let go too early"
        written = table.blocks[(sequence.computed - table.shift) // self.block - table.first :]
        assert all(self.pools[group].holders[block] == 1 for block in written), "others hold a block to be written"


def _end(sequence: Sequence, whole: bool) -> int:
    """Tokens that a sequence has; with `whole`, those whose keys it will have at its end."""
    return max(len(sequence.tokens), sequence.prompt + sequence.limit - 1 if whole else 0)
