"""Blocks, prefixes, tables and plans: bookkeeping without tensors."""

from __future__ import annotations

import pytest

from layerwise.errors import BadOption
from layerwise.serve.blocks import BlockPool
from layerwise.serve.plan import plan
from layerwise.serve.prefix import Node, PrefixTree
from layerwise.serve.request import Params, Request
from layerwise.serve.sequence import BlockTable, Row, Sequence
from layerwise.serve.table import layer_table
from tests.serve.plain import KINDS


def test_blocks_are_free_until_held_and_after_the_last_release() -> None:
    pool = BlockPool(4)
    a = pool.take()
    b = pool.take(after=a)
    assert (a, b) == (0, 1) and pool.free == 2
    pool.hold(a)
    pool.release(a)
    pool.check([a, b])
    pool.release(a)
    assert pool.free == 3 and pool.take() == a
    with pytest.raises(AssertionError):
        pool.release(3)
    with pytest.raises(AssertionError):
        pool.check([a])


def test_runs_stay_contiguous_where_they_can() -> None:
    pool = BlockPool(8)
    first, other = pool.take(), pool.take()
    run = [pool.take(after=other)]
    run.append(pool.take(after=run[-1]))
    pool.release(first)
    run.append(pool.take(after=run[-1]))
    assert run == [2, 3, 4] and pool.take(after=7) == 0


def test_an_exhausted_pool_says_so() -> None:
    pool = BlockPool(1)
    pool.take()
    with pytest.raises(IndexError):
        pool.take()


def tree_of(*texts: tuple[int, ...]) -> tuple[PrefixTree, list[BlockPool]]:
    pools = [BlockPool(10), BlockPool(10)]
    tree = PrefixTree(pools, 2)
    for text in texts:
        node = tree.root
        for start in range(0, len(text), 2):
            blocks = tuple(pool.take() for pool in pools)
            node = tree.insert(node, text[start : start + 2], blocks)
            for pool, block in zip(pools, blocks, strict=True):
                pool.release(block)
    return tree, pools


def test_a_match_leaves_a_token_to_compute() -> None:
    tree, _ = tree_of((1, 2, 3, 4), (1, 2, 5, 6))
    tree.check()
    assert tree.size == 3
    assert [node.tokens for node in tree.match([1, 2, 3, 4, 9])] == [(1, 2), (3, 4)]
    assert [node.tokens for node in tree.match([1, 2, 3, 4])] == [(1, 2)]
    assert tree.match([2, 1, 3]) == [] and tree.match([1]) == []


def test_leaves_nobody_uses_go_first_the_longest_unused_before_others() -> None:
    tree, pools = tree_of((1, 2, 3, 4), (1, 2, 5, 6), (7, 8))
    tree.touch(tree.match([1, 2, 3, 4, 0]))
    pools[0].hold(tree.match([7, 8, 0])[0].blocks[0])
    assert tree.evict(0, 7)
    assert [node.tokens for node in tree.match([1, 2, 5, 6, 0])] == [(1, 2)]
    assert len(tree.match([1, 2, 3, 4, 0])) == 2 and tree.match([7, 8, 0])
    tree.match([1, 2, 3, 4, 0])[-1].users += 1
    assert not tree.evict(1, 9)
    tree.check()
    for group, pool in enumerate(pools):
        assert sorted(tree.held(group)) == [block for block in range(10) if pool.holders[block]]


def test_eviction_is_pluggable() -> None:
    def newest(node: Node) -> tuple[int, ...]:
        return (-node.used,)

    pools = [BlockPool(3)]
    tree = PrefixTree(pools, 1, newest)
    for token in range(3):
        tree.insert(tree.root, (token,), (pools[0].take(),))
        pools[0].release(token)
    assert tree.evict(0, 2)
    assert tree.match([0, 0]) and not tree.match([1, 0]) and not tree.match([2, 0])


def test_tables_say_what_each_layer_keeps() -> None:
    table = layer_table(KINDS["windows"].stack().spec, budgets={1: 12}, precision={0: "int8"})
    assert [(entry.kind, entry.tokens, entry.group) for entry in table.layers] == [
        ("window", 9, 0), ("budget", 12, 1), ("window", 20, 2), ("window", 9, 0)]
    assert [group.layers for group in table.groups] == [(0, 3), (1,), (2,)]
    assert table.groups[0].token_bytes == 2 * 2 * 16 * 4 + 2 * 2 * (16 + 4)
    assert table.has_budgets and table.fingerprint() != layer_table(KINDS["windows"].stack().spec).fingerprint()


def test_shared_layers_keep_what_any_reader_needs() -> None:
    table = layer_table(KINDS["shared"].stack().spec)
    assert [(entry.kind, entry.tokens, entry.group) for entry in table.layers] == [
        ("full", None, 0), ("full", None, 0), ("shared", None, 0), ("shared", None, 0), ("shared", None, 0)]


@pytest.mark.parametrize("wish", [{"budgets": {0: 5}}, {"budgets": {1: 0}}, {"budgets": {9: 1}}, {"skip": [4]}])
def test_impossible_tables_are_refused(wish: dict[str, object]) -> None:
    with pytest.raises(BadOption):
        layer_table(KINDS["windows"].stack().spec, **wish)  # type: ignore[arg-type]


def test_keys_that_are_read_cannot_be_skipped() -> None:
    spec = KINDS["shared"].stack().spec
    with pytest.raises(BadOption, match="layer 3 as well"):
        layer_table(spec, skip=[1])
    assert layer_table(spec, skip=[1, 3]).skipped == {1, 3}


def row(start: int, layers: range) -> Row:
    return Row(Sequence(Request((1,) * 5, Params()), 0, 9, 0, [BlockTable()]), start, 1, 1, layers)


def test_an_ordinary_step_is_one_entry() -> None:
    entry, = plan([row(0, range(6)), row(7, range(6))])
    assert (entry.rows, entry.layers) == ((0, 1), range(6))


def test_layered_prompts_share_their_layers_with_the_others() -> None:
    entries = plan([row(7, range(6)), row(0, range(2, 4))])
    assert [(entry.rows, entry.layers) for entry in entries] == [
        ((0,), range(2)), ((0, 1), range(2, 4)), ((0,), range(4, 6))]


def test_generated_tokens_leave_layers_out() -> None:
    entries = plan([row(0, range(4)), row(5, range(4))], skipped={1, 2})
    assert [(entry.rows, entry.layers) for entry in entries] == [
        ((0, 1), range(1)), ((0,), range(1, 3)), ((0, 1), range(3, 4))]
    alone = plan([row(5, range(4))], skipped={1, 2})
    assert [(entry.rows, entry.layers) for entry in alone] == [((0,), range(1)), ((0,), range(3, 4))]
