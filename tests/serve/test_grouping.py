"""Groups against every other way to group, orders and lifetimes against what they promise."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import pytest

from layerwise.serve.caches import Caches
from layerwise.serve.grouping import (
    Group,
    Lifetimes,
    Prompt,
    decode_ratio,
    grouped,
    ordered,
    promoted,
    shareable,
    stems,
)
from layerwise.serve.prefix import Node, PrefixTree
from layerwise.serve.table import layer_table
from tests.serve.plain import KINDS


def partitions(items: Sequence[int]) -> Iterator[list[list[int]]]:
    if not items:
        yield []
        return
    for rest in partitions(items[1:]):
        yield [[items[0]], *rest]
        for place in range(len(rest)):
            yield [*rest[:place], [items[0], *rest[place]], *rest[place + 1 :]]


def common(prompts: Sequence[Prompt], block: int) -> int:
    """Whole blocks that all prompts begin with; their last tokens stay out."""
    length = 0
    while all(len(prompt) > length + block for prompt in prompts) and len(
        {tuple(prompt[: length + block]) for prompt in prompts}) == 1:
        length += block
    return length


def drawn(seed: int) -> tuple[list[list[int]], int]:
    draw = random.Random(seed)
    prompts = [[draw.randint(0, 1) for _ in range(draw.randint(1, 10))] for _ in range(draw.randint(1, 6))]
    return prompts, draw.choice([1, 2])


def saved(groups: Sequence[Group]) -> int:
    return sum(group.saved for group in groups)


def test_a_tree_by_hand() -> None:
    root = stems([[1, 2, 3, 4, 5], [1, 2, 9], [1, 2, 3, 4], [7], [1, 2, 3, 4, 6, 6]], 2)
    assert (root.count, root.ends, [stem.length for stem in root.below()]) == (5, [3], [0, 2, 4])
    stem, = root.branches
    assert (stem.count, sorted(stem.ends)) == (4, [1, 2])
    assert sorted(stem.branches[0].members()) == [0, 4]
    assert shareable(root) == 3 * 2 + 2
    assert sorted((group.length, sorted(group.members)) for group in grouped(root)) == [(0, [3]), (2, [0, 1, 2, 4])]


@pytest.mark.parametrize("seed", range(40))
def test_no_other_grouping_saves_more(seed: int) -> None:
    prompts, block = drawn(seed)
    root = stems(prompts, block)
    best = max(sum((len(part) - 1) * common([prompts[index] for index in part], block) for part in parts)
               for parts in partitions(range(len(prompts))))
    assert saved(grouped(root)) == best
    assert saved(promoted(root)) <= best <= shareable(root)
    for groups in (grouped(root), promoted(root)):
        assert sorted(index for group in groups for index in group.members) == list(range(len(prompts)))
        for group in groups:
            assert common([prompts[index] for index in group.members], block) >= group.length * (
                len(group.members) > 1)


def test_the_paper_s_pass_lifts_what_saves_more_than_its_copy() -> None:
    small = [[1] * 4 + [index] * 8 + [5] for index in (2, 2, 3, 3)]
    assert sorted(group.length for group in promoted(stems(small, 4))) == [12, 12]
    large = [[1] * 12 + [index] * 8 + [5] for index in (2, 2, 3, 3)]
    assert [group.length for group in promoted(stems(large, 4))] == [12]


def test_groups_that_write_most_go_first() -> None:
    prompts, outputs = [[1] * 9, [2] * 9, [1] * 9, [2] * 9], [1, 4, 2, 9]
    first, second = ordered(prompts, outputs, 4)
    assert sorted(first.members) == [1, 3] and first.length == second.length == 8
    assert decode_ratio(first, prompts, outputs) == 13 / 10


def test_beginnings_stay_as_long_as_their_group() -> None:
    prompts = [[1, 1, 2, 2, 9], [1, 1, 2, 2, 8], [5, 5, 9], [5, 5, 8]]
    lifetimes = Lifetimes(prompts, grouped(stems(prompts, 2)), 2)
    root = Node(None, (), (), 0)
    one = Node(root, (1, 1), (0,), 1, used=1)
    two = Node(one, (2, 2), (1,), 2, used=2)
    other = Node(root, (5, 5), (2,), 1, used=3)
    foreign = [Node(two, (9, 9), (3,), 3, used=9), Node(root, (6, 6), (4,), 1, used=9), Node(one, (5, 5), (5,), 2)]
    assert [lifetimes(node)[0] for node in (one, two, other, *foreign)] == [1, 1, 1, 0, 0, 0]
    lifetimes.done(0)
    assert lifetimes(two)[0] == 1
    lifetimes.done(1)
    lifetimes.done(1)
    assert [lifetimes(node)[0] for node in (one, two, other)] == [0, 0, 1]


def test_nothing_is_evicted_for_what_cannot_be_had() -> None:
    caches = Caches(layer_table(KINDS["full"].stack().spec), 4, 2)
    tree = caches.tree
    assert isinstance(tree, PrefixTree)
    for token in (1, 2):
        block = caches.pools[0].take()
        tree.insert(tree.root, (token, token), (block,))
        caches.pools[0].release(block)
    caches.pools[0].take()
    assert not tree.evict(0, 4) and tree.size == 2
    assert tree.evict(0, 3) and tree.size == 0
