"""Sharing keys and values across layers: one truth with and without caches, through edits and files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import layerwise as lw
from layerwise.allocate.stopwatch import Stopwatch
from layerwise.errors import BadOption
from layerwise.generate.sample import generate, next_logits
from layerwise.nets.decoder import Block
from layerwise.spec import Attention, FeedForward, LayerSpec
from layerwise.stack.decoder import Caches, DecoderStack
from layerwise.stack.tail import Tail
from layerwise.testing.stacks import random_stack
from layerwise.transform.drop import Drop
from layerwise.transform.quantize import Quantize
from layerwise.transform.share_kv import ShareKV

TOKENS_BT = torch.randint(97, (2, 11), generator=torch.Generator().manual_seed(1))


def shared(stack: DecoderStack, source: int, *layers: int) -> DecoderStack:
    edit, blocks = ShareKV(source), [stack.block(layer) for layer in range(len(stack))]
    for layer in layers:
        blocks[layer] = edit.apply(blocks[layer], stack.spec.rows[layer])
    rows = {layer: edit.edit(stack.spec.rows[layer], stack.spec.hidden) for layer in layers}
    return stack.rebuilt(stack.spec.with_rows(rows), blocks)


@pytest.fixture(scope="module")
def stack() -> DecoderStack:
    row = LayerSpec(Attention(heads=4, kv_heads=2, head_dim=16, qk_norm=True, qkv_bias=True), FeedForward(width=96))
    return shared(random_stack(5, row=row), 1, 2, 4)


def test_a_layer_attends_to_the_keys_of_its_source(stack: DecoderStack) -> None:
    state = stack.run(stack.start(TOKENS_BT), slice(0, 4))
    source, reader = stack.block(1), stack.block(4)
    assert isinstance(source, Block) and isinstance(reader, Block)
    assert source.attention is not None and reader.attention is not None
    entering = stack.run(stack.start(TOKENS_BT), slice(0, 1))
    _, k, v = source.attention.body._queries_and_keys(source.attention.norm(entering.hidden), entering.shared)
    q = reader.attention.body._queries(reader.attention.norm(state.hidden), state.shared)
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    weights = (q @ k.mT / 4).masked_fill(~torch.ones(11, 11).tril().bool(), float("-inf")).softmax(-1)
    expected = reader.attention.body.o((weights @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(reader.attention(state.hidden, state.shared, 4), expected)


def test_cached_runs_are_plain_runs(stack: DecoderStack) -> None:
    caches: Caches = {}
    parts = [stack(TOKENS_BT[:, a:b], caches=caches) for a, b in ((0, 4), (4, 5), (5, 6), (6, 11))]
    torch.testing.assert_close(torch.cat(parts, 1), stack(TOKENS_BT), rtol=1e-4, atol=1e-5)
    assert set(caches) == {0, 1, 3}


def test_padded_batches_are_plain_runs(stack: DecoderStack) -> None:
    mask_BT = torch.ones(2, 11, dtype=torch.bool)
    mask_BT[1, :4] = False
    found = stack(TOKENS_BT, mask_BT)[1, 4:]
    torch.testing.assert_close(found, stack(TOKENS_BT[1:, 4:])[0], rtol=1e-4, atol=1e-5)


def test_states_can_be_run_again_after_another_run(stack: DecoderStack) -> None:
    entering = stack.run(stack.start(TOKENS_BT), slice(0, 1))
    late = stack.run(entering, slice(1, 3))
    expected = stack.finish(stack.run(late))
    with stack.zero(0, "output"):
        stack.run(stack.start(TOKENS_BT))
    stack.run(entering.moved(entering.hidden * 2, 1))
    assert torch.equal(stack.finish(stack.run(late)), expected)


def test_tails_read_the_prefix_too(stack: DecoderStack) -> None:
    rows = TOKENS_BT.tolist()
    tail = Tail(stack, rows, [5, 8])
    found_BV = tail.last(tail.run(tail.enter(3)))
    torch.testing.assert_close(found_BV, stack(TOKENS_BT)[:, -1], rtol=1e-4, atol=1e-5)


def test_removing_layers_moves_the_source(stack: DecoderStack) -> None:
    spec = stack.spec.with_rows({0: None, 3: None})
    assert [row.mixer.shares for row in spec.rows] == [None, 0, 0]  # type: ignore[union-attr]
    slim = stack.rebuilt(spec, [stack.block(layer) for layer in (1, 2, 4)])
    with stack.skip(0), stack.skip(3):
        expected = stack(TOKENS_BT)
    assert torch.equal(slim(TOKENS_BT), expected)


@pytest.mark.parametrize("rows", [{1: None}, {1: Drop("attention")}, {1: ShareKV(0)}, {3: ShareKV(4)}, {2: ShareKV(2)}])
def test_a_source_that_is_none_is_refused(stack: DecoderStack, rows: dict[int, Drop | ShareKV | None]) -> None:
    edited = {layer: edit and edit.edit(stack.spec.rows[layer], 64) for layer, edit in rows.items()}
    with pytest.raises(BadOption, match="shares the keys and values"):
        stack.spec.with_rows(edited)


def test_a_layer_without_attention_cannot_share() -> None:
    with pytest.raises(BadOption, match="without attention"):
        ShareKV(0).edit(LayerSpec(None, FeedForward(8)), 8)
    with pytest.raises(BadOption, match="source=-1"):
        ShareKV(-1)


def test_packed_matrices_go_with_their_layer(stack: DecoderStack) -> None:
    row = Quantize(4).edit(stack.spec.rows[0], 64)
    assert set(ShareKV(0).edit(row, 64).formats) == {"q", "o", "gate", "up", "down"}


def test_saved_stacks_open_as_they_were(stack: DecoderStack, tmp_path: Path) -> None:
    folder = stack.save(tmp_path / "shared")
    again, streamed = lw.open(folder), lw.open(folder, stream=True)
    assert again.spec.rows == stack.spec.rows and again.spec.bytes() == stack.spec.bytes()
    assert torch.equal(again(TOKENS_BT), stack(TOKENS_BT)) and torch.equal(streamed(TOKENS_BT), stack(TOKENS_BT))


def test_greedy_text_is_that_of_plain_runs(stack: DecoderStack) -> None:
    tokens = [3, 1, 4]
    for token in generate(stack, tokens, max_tokens=12):
        assert token == int(next_logits(stack, torch.tensor([tokens]), {}).argmax())
        tokens = [*tokens, token]


def test_sharing_rows_can_be_timed(stack: DecoderStack) -> None:
    watch = Stopwatch(stack.spec, past=16, repeats=2, folder=None)
    assert watch.row(stack.spec.rows[4]) > 0
