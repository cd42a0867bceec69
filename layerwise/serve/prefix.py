"""Prompts share their beginnings: a radix tree over whole blocks of tokens, whose nodes hold the cached blocks.

A node stands for all tokens from the root to it and holds one block of every group. It counts as one holder of each,
so blocks outlive the sequence that wrote them until they are evicted, leaves first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from layerwise.serve.blocks import BlockPool

Key = tuple[int, ...]


@dataclass(eq=False)
class Node:
    """`tokens` of one block after those of `parent`; `blocks` by group; `used` is the time of the last use.

    `users` are the sequences that go on from here; they keep the node.
    """

    parent: Node | None
    tokens: Key
    blocks: tuple[int, ...]
    depth: int
    used: int = 0
    users: int = 0
    children: dict[Key, Node] = field(default_factory=dict)


Eviction = Callable[[Node], tuple[int, ...]]
"""What to evict first: the leaf for which this is smallest."""


def recency(node: Node) -> tuple[int, ...]:
    """Least recently used first; of those used together, the deepest."""
    return node.used, -node.depth


class PrefixTree:
    """Blocks of tokens that every layer has computed. `pools` are the groups' blocks, `block` tokens each."""

    def __init__(self, pools: Sequence[BlockPool], block: int, eviction: Eviction = recency) -> None:
        self.pools, self.block, self.eviction = pools, block, eviction
        self.root = Node(None, (), (), 0)
        self._leaves: dict[Node, None] = {}
        self._clock = 0
        self.size = 0

    def match(self, tokens: Sequence[int]) -> list[Node]:
        """The longest known path for `tokens`, which leaves at least one token to compute."""
        path: list[Node] = []
        node = self.root
        for start in range(0, len(tokens) - self.block, self.block):
            child = node.children.get(tuple(tokens[start : start + self.block]))
            if child is None:
                break
            path.append(child)
            node = child
        return path

    def touch(self, path: Sequence[Node]) -> None:
        """Note that the nodes were used now."""
        self._clock += 1
        for node in path:
            node.used = self._clock

    def insert(self, parent: Node, tokens: Key, blocks: tuple[int, ...]) -> Node:
        """The node for `tokens` below `parent`; where it is new it holds `blocks`, otherwise those it had."""
        known = parent.children.get(tokens)
        if known is not None:
            return known
        self._clock += 1
        node = Node(parent, tokens, blocks, parent.depth + 1, self._clock)
        for pool, block in zip(self.pools, blocks, strict=True):
            pool.hold(block)
        parent.children[tokens] = node
        self._leaves.pop(parent, None)
        self._leaves[node] = None
        self.size += 1
        return node

    def evict(self, group: int, count: int) -> bool:
        """Let nodes go until `group` has `count` free blocks; False, and none goes, where too many are in use."""
        pool = self.pools[group]
        if pool.free < count and pool.free + self._idle_nodes() < count:
            return False
        while pool.free < count:
            self._remove(min((leaf for leaf in self._leaves if self._idle(leaf)), key=self.eviction))
        return True

    def clear(self) -> None:
        """Let every node go that no sequence uses."""
        while idle := [leaf for leaf in self._leaves if self._idle(leaf)]:
            for leaf in idle:
                self._remove(leaf)

    def held(self, group: int) -> Iterator[int]:
        """Every block of a group that a node holds."""
        return (node.blocks[group] for node in self.nodes())

    def nodes(self) -> Iterator[Node]:
        """All nodes but the root."""
        stack = list(self.root.children.values())
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.children.values())

    def check(self) -> None:
        """Assert that leaves and sizes are what the tree says."""
        nodes = list(self.nodes())
        assert self.size == len(nodes), "the tree has lost count of its nodes"
        assert set(self._leaves) == {node for node in nodes if not node.children}, "leaves are not the leaves"
        assert all(len(node.tokens) == self.block for node in nodes), "a node holds a block in part"

    def _idle_nodes(self) -> int:
        """How many nodes nobody uses, nor anything below them."""
        used: set[Node | None] = set()
        for node in reversed(list(self.nodes())):
            if node in used or not self._idle(node):
                used.update((node, node.parent))
        return self.size - len(used - {self.root})

    def _idle(self, node: Node) -> bool:
        held = (pool.holders[block] for pool, block in zip(self.pools, node.blocks, strict=True))
        return not node.users and all(holders == 1 for holders in held)

    def _remove(self, node: Node) -> None:
        parent = node.parent
        assert parent is not None and not node.children
        for pool, block in zip(self.pools, node.blocks, strict=True):
            pool.release(block)
        del parent.children[node.tokens], self._leaves[node]
        if parent is not self.root and not parent.children:
            self._leaves[parent] = None
        self.size -= 1
