"""Requests that are all known beforehand: which begin alike, and the order in which beginnings are computed once.

Every request belongs to one group with one shared beginning, so that a beginning is kept exactly as long as its group
runs. Groups that write most for what they read go first: while they write, the prompts of later ones fill their steps.

Source: BatchLLM (arXiv 2412.03594). The exact grouping, `grouped`, is ours; `promoted` is our reading of its pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

from layerwise.serve.prefix import Key, Node

Prompt = Sequence[int] | str
"""Token ids; or text, of which letters take the place of tokens."""


@dataclass(eq=False)
class Stem:
    """The first `length` tokens of some prompts: those that have nothing more to share (`ends`), and branches."""

    length: int
    ends: list[int] = field(default_factory=list)
    branches: list[Stem] = field(default_factory=list)
    count: int = 0

    def below(self) -> Iterator[Stem]:
        """This stem and all that grow from it, each before its branches."""
        stack = [self]
        while stack:
            stem = stack.pop()
            yield stem
            stack.extend(reversed(stem.branches))

    def members(self) -> list[int]:
        """All prompts that begin so, neighbours in the tree beside one another."""
        return [index for stem in self.below() for index in stem.ends]


@dataclass(frozen=True)
class Group:
    """Prompts, by their places in the list, that share their first `length` tokens."""

    length: int
    members: tuple[int, ...]

    @property
    def saved(self) -> int:
        """Tokens that need not be computed, since the first member has."""
        return (len(self.members) - 1) * self.length


def stems(prompts: Sequence[Prompt], block: int) -> Stem:
    """The tree of beginnings in whole blocks of tokens; the last token of a prompt is never shared."""
    usable = [prompt[: max(0, len(prompt) - 1) // block * block] for prompt in prompts]
    root, before = Stem(0), usable[0][:0] if usable else ""
    path = [root]
    for index in sorted(range(len(usable)), key=lambda index: usable[index]):  # type: ignore[arg-type, return-value]
        tokens = usable[index]
        shared, last = _common(before, tokens) // block * block, root
        while path[-1].length > shared:
            last = path.pop()
        if path[-1].length < shared:
            path[-1].branches[-1] = Stem(shared, branches=[last])
            path.append(path[-1].branches[-1])
        if path[-1].length < len(tokens):
            path[-1].branches.append(Stem(len(tokens)))
            path.append(path[-1].branches[-1])
        path[-1].ends.append(index)
        before = tokens
    for stem in reversed(list(root.below())):
        stem.count = len(stem.ends) + sum(branch.count for branch in stem.branches)
    return root


def shareable(root: Stem) -> int:
    """Tokens that need not be computed where every beginning is computed once, however many levels they have."""
    return sum((branch.count - 1) * (branch.length - stem.length) for stem in root.below() for branch in stem.branches)


def grouped(root: Stem) -> list[Group]:
    """Groups of one level each that save the most tokens, in the order of the tree.

    The best for a stem depends only on the length of the nearest group around it: with v(stem, a) the tokens saved
    below a stem where that length is a, v = max(sum of v(branch, a), -length + sum of v(branch, length)).
    """
    order = list(root.below())
    parents = {branch: stem for stem in order for branch in stem.branches}
    around: dict[Stem, tuple[int, ...]] = {root: (0,)}
    for stem in order[1:]:
        around[stem] = (*around[parents[stem]], parents[stem].length) if parents[stem] is not root else (0,)
    value: dict[tuple[Stem, int], int] = {}
    opened: set[tuple[Stem, int]] = set()
    for stem in reversed(order):
        own = _gain(stem, stem.length, value) - stem.length
        for length in around[stem]:
            value[stem, length] = max(_gain(stem, length, value), own)
            if own > _gain(stem, length, value):
                opened.add((stem, length))
    return _collected(root, opened)


def _gain(stem: Stem, length: int, value: dict[tuple[Stem, int], int]) -> int:
    """Tokens saved at and below a stem within a group of `length`."""
    return length * len(stem.ends) + sum(value.get((branch, length), 0) for branch in stem.branches)


def _collected(root: Stem, opened: set[tuple[Stem, int]]) -> list[Group]:
    found: dict[tuple[Stem, int] | int, tuple[int, list[int]]] = {}
    stack: list[tuple[Stem, Stem]] = [(root, root)]
    while stack:
        stem, group = stack.pop()
        if (stem, group.length) in opened:
            group = stem
        for index in stem.ends:
            key = (group, 0) if group.length else index
            found.setdefault(key, (group.length, []))[1].append(index)
        stack.extend((branch, group) for branch in reversed(stem.branches))
    return [Group(length, tuple(members)) for length, members in found.values()]


def promoted(root: Stem) -> list[Group]:
    """Groups by the paper's pass from the leaves up: a branch of a branch becomes a branch, taking a copy of the
    beginning with it, where it saves more tokens by itself than that copy has.
    """
    tops: dict[Stem, list[Stem]] = {}
    for stem in reversed(list(root.below())):
        branches: list[Stem] = []
        for branch in stem.branches:
            own = branch.length - stem.length
            lifted = [deeper for deeper in tops.pop(branch)
                      if (deeper.count - 1) * (deeper.length - branch.length) > own]
            branches += [branch, *lifted]
        tops[stem] = branches
    found, taken = [], set[int]()
    for stem in sorted(tops[root], key=lambda stem: -stem.length):
        members = tuple(index for index in stem.members() if index not in taken)
        taken.update(members)
        if members:
            found.append(Group(stem.length, members) if len(members) > 1 else Group(0, members))
    return found + [Group(0, (index,)) for index in root.ends]


def decode_ratio(group: Group, prompts: Sequence[Prompt], outputs: Sequence[int]) -> float:
    """Tokens that a group writes for each that it must read."""
    read = group.length + sum(len(prompts[index]) - group.length for index in group.members)
    return sum(outputs[index] for index in group.members) / max(1, read)


def ordered(prompts: Sequence[Prompt], outputs: Sequence[int], block: int) -> list[Group]:
    """The groups in the order in which they are best run; `outputs` are the tokens that each request will write."""
    return sorted(grouped(stems(prompts, block)), key=lambda group: -decode_ratio(group, prompts, outputs))


class Lifetimes:
    """An eviction that keeps the beginning of a group until its last member has ended, and nothing else for long.

    Say `done(index)` when a request has ended.
    """

    def __init__(self, prompts: Sequence[Sequence[int]], groups: Sequence[Group], block: int) -> None:
        self._places: dict[tuple[int, Key], int] = {}
        self._left: list[int] = [0]
        self._known: WeakKeyDictionary[Node, int] = WeakKeyDictionary()
        self._paths: dict[int, list[int]] = {}
        for group in groups:
            path = self._path(prompts[group.members[0]][: group.length], block)
            for index in group.members:
                self._paths[index] = path
            for place in path:
                self._left[place] += len(group.members)

    def done(self, index: int) -> None:
        """The request at this place in the list needs nothing any more."""
        for place in self._paths.pop(index, ()):
            self._left[place] -= 1

    def __call__(self, node: Node) -> tuple[int, ...]:
        return int(self._left[self._place(node)] > 0), node.used, -node.depth

    def _path(self, tokens: Sequence[int], block: int) -> list[int]:
        place, found = 0, []
        for start in range(0, len(tokens), block):
            key = place, tuple(tokens[start : start + block])
            if key not in self._places:
                self._places[key] = len(self._left)
                self._left.append(0)
            place = self._places[key]
            found.append(place)
        return found

    def _place(self, node: Node) -> int:
        """The node's beginning among those of groups; 0 for any other."""
        path = []
        while node.parent is not None and node not in self._known:
            path.append(node)
            node = node.parent
        place = self._known.get(node, 0)
        for each in reversed(path):
            inside = place or each.depth == 1
            place = self._places.get((place, each.tokens), 0) if inside else 0
            self._known[each] = place
        return place


def _common(a: Prompt, b: Prompt) -> int:
    """Length of the common beginning of two sequences."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
