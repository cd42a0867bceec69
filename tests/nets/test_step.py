"""A packed block in one call gives what its parts give."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import layerwise as lw
from layerwise.nets import wide
from layerwise.nets.attend import Pages
from layerwise.nets.compiled import library
from layerwise.nets.prepared import DirectBlock
from layerwise.nets.step import Step, through
from layerwise.nets.wide import may_widen
from layerwise.serve import plan
from layerwise.serve.pool import Pool
from layerwise.serve.request import Params
from layerwise.serve.runner import Runner
from layerwise.spec import Attention, FeedForward, LayerSpec, Norm
from layerwise.stack.decoder import DecoderStack
from layerwise.testing.stacks import random_stack
from layerwise.transform.quantize import Quantize

pytestmark = pytest.mark.skipif(library() is None, reason="no C compiler with OpenMP")

PLAIN = LayerSpec(Attention(heads=4, kv_heads=2, head_dim=16), FeedForward(width=96))
PROMPTS = [[5, 17, 3], list(range(1, 30)), [9] * 12]
ROUNDING = 1e-3
"""What rounding inputs to 16 bits in three layers may move a log probability by; most where each half is normed."""
GREEDY = Params(max_tokens=12, temperature=0.0, logprobs=2, stop_ids=())


def packed(row: LayerSpec = PLAIN, dtype: str = "float32", **options: object) -> DecoderStack:
    stack, change = random_stack(3, row=row, dtype=dtype), Quantize(4, group=32, **options)  # type: ignore[arg-type]
    rows, blocks = [], []
    for layer in range(3):
        rows.append(change.edit(stack.spec.rows[layer], 64))
        block = change.apply(stack.block(layer), stack.spec.rows[layer])  # type: ignore[arg-type]
        assert block is not None
        blocks.append(block)
    return stack.rebuilt(stack.spec.with_rows(dict(enumerate(rows))), blocks)


def steps(engine: lw.Engine) -> list[bool]:
    blocks = [engine.stack.block(layer) for layer in range(3)]
    return [isinstance(block, DirectBlock) and block.step is not None for block in blocks]


@pytest.mark.parametrize("row", [
    PLAIN, LayerSpec(Attention(4, 2, 16, qkv_bias=True, out_bias=True), FeedForward(96)),
    replace(PLAIN, mixer=Attention(4, 4, 16, window=6)),
    LayerSpec(Attention(4, 2, 16, qk_norm=True), FeedForward(96)),
    LayerSpec(Attention(4, 1, 32, qk_norm=True, scale=0.2), FeedForward(96, activation="gelu_tanh"),
              Norm("rms", 1e-6, 1.0), post_norm=True)],
    ids=["plain", "biases", "window", "norms of heads", "norms behind halves"])
def test_tokens_are_those_of_the_parts(row: LayerSpec) -> None:
    stack = packed(row)
    whole, parts = lw.Engine(stack, cache_tokens=512), lw.Engine(stack, cache_tokens=512, prepare=False)
    assert all(steps(whole)) and not any(steps(parts))
    for found, expected in zip(whole.generate(PROMPTS, GREEDY), parts.generate(PROMPTS, GREEDY), strict=True):
        assert found.tokens == expected.tokens
        assert found.logprobs is not None and expected.logprobs is not None
        for one, other in zip(found.logprobs, expected.logprobs, strict=True):
            assert one.logprob == pytest.approx(other.logprob, abs=ROUNDING)


def test_matrices_that_read_the_same_may_be_stored_differently() -> None:
    """What a plan with a choice for every matrix looks like."""
    stack = random_stack(3, row=PLAIN)
    rows, blocks = list(stack.spec.rows), [stack.block(layer) for layer in range(3)]
    for layer, bits in enumerate(((8, 4, 3), (3, 3, 5), (4, 6, 2))):
        for width, names in zip(bits, (("q", "o"), ("k", "gate"), ("v", "up", "down")), strict=True):
            change = Quantize(width, group=32, matrices=names)
            blocks[layer] = change.apply(blocks[layer], rows[layer])  # type: ignore[arg-type]
            rows[layer] = change.edit(rows[layer], 64)
    stack = stack.rebuilt(stack.spec.with_rows(dict(enumerate(rows))), blocks)
    whole, parts = lw.Engine(stack, cache_tokens=512), lw.Engine(stack, cache_tokens=512, prepare=False)
    assert all(steps(whole))
    assert [done.tokens for done in whole.generate(PROMPTS, GREEDY)] == [
        done.tokens for done in parts.generate(PROMPTS, GREEDY)]


@pytest.mark.parametrize("slow", [False, True])
def test_half_precision(slow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the stream stays in half precision, with norms of float32 in it."""
    monkeypatch.setattr(wide, "SLOW", {torch.bfloat16: 8} if slow else {})
    engine = lw.Engine(packed(dtype="bfloat16"), cache_tokens=512)
    assert engine.stack.dtype == (torch.float32 if slow else torch.bfloat16)
    assert all(steps(engine))
    kept = [pool for pool in engine.runner.pools if isinstance(pool, Pool)]
    assert all(pool.k.dtype == torch.bfloat16 for pool in kept)
    assert sum(pool.k.nbytes + pool.v.nbytes for pool in kept) == 512 * engine.table.groups[0].token_bytes
    answers = [done.tokens for done in engine.generate(PROMPTS, GREEDY)]
    assert all(len(tokens) == 12 for tokens in answers)
    if slow:
        chunked = lw.Engine(packed(dtype="bfloat16"), cache_tokens=512, step_tokens=2, running=2)
        assert [done.tokens for done in chunked.generate(PROMPTS, GREEDY)] == answers


@pytest.mark.parametrize("row", [
    replace(PLAIN, feed_forward=FeedForward(96, activation="gelu")),
    replace(PLAIN, feed_forward=FeedForward(96, bias=True)), replace(PLAIN, feed_forward=FeedForward(96, gated=False)),
    replace(PLAIN, norm=Norm("layer"))], ids=["gelu", "biases", "no gate", "layer norm"])
def test_other_blocks_go_part_by_part(row: LayerSpec) -> None:
    stack = packed(row)
    engine, plain = lw.Engine(stack, cache_tokens=512), lw.Engine(stack, cache_tokens=512, prepare=False)
    assert not any(steps(engine))
    assert [done.tokens for done in engine.generate(PROMPTS, GREEDY)] == [
        done.tokens for done in plain.generate(PROMPTS, GREEDY)]


@pytest.mark.skipif(not may_widen(torch.device("cpu"), torch.bfloat16), reason="this processor is fast in bfloat16")
@pytest.mark.parametrize("matrices", [(), ("k", "gate", "o")], ids=["none", "some"])
def test_dense_matrices_of_half_precision_are_read_as_they_are(matrices: tuple[str, ...]) -> None:
    stack = packed(dtype="bfloat16", matrices=matrices)
    whole = lw.Engine(stack, cache_tokens=512)
    exact = lw.Engine(stack.copied(torch.float32), cache_tokens=512, prepare=False)
    assert all(steps(whole))
    exact.runner = Runner(exact.stack, exact.table, 32, 16, kept=torch.bfloat16)
    for found, right in zip(whole.generate(PROMPTS, GREEDY), exact.generate(PROMPTS, GREEDY), strict=True):
        assert found.tokens == right.tokens and found.logprobs is not None and right.logprobs is not None
        for one, other in zip(found.logprobs, right.logprobs, strict=True):
            assert one.logprob == pytest.approx(other.logprob, abs=ROUNDING)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_last_layer_makes_what_is_read(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that are wanted are as if all were; the others come as they were before the last layer."""
    counts: list[int] = []
    tolerance = 1e-2 if dtype == "bfloat16" else 1e-4

    def checked(passes: list[tuple[Step, Pages]], x_NC: Tensor, wanted_P: Tensor | None = None) -> Tensor:
        whole_NC, found_NC = through(passes, x_NC), through(passes, x_NC, wanted_P)
        if wanted_P is None:
            return found_NC
        counts.append(len(wanted_P))
        others = torch.ones(len(x_NC), dtype=torch.bool).index_fill(0, wanted_P, value=False)
        torch.testing.assert_close(found_NC[wanted_P], whole_NC[wanted_P], rtol=tolerance, atol=tolerance)
        assert torch.equal(found_NC[others], through(passes[:-1], x_NC)[others])
        assert torch.equal(through(passes[-1:], x_NC, wanted_P)[others], x_NC[others])
        return through(passes, x_NC, wanted_P)

    monkeypatch.setattr(plan, "through", checked)
    engine, plain = lw.Engine(packed(dtype=dtype), cache_tokens=512, step_tokens=16, running=4), lw.Engine(
        packed(dtype=dtype), cache_tokens=512, prepare=False)
    prompts = [list(range(1, 41)), *PROMPTS]
    answers = [done.tokens for done in engine.generate(prompts, GREEDY)]
    assert 0 in counts and max(counts) > 0
    if dtype == "float32":
        assert answers == [done.tokens for done in plain.generate(prompts, GREEDY)]


def test_blocks_of_which_only_a_part_is_packed() -> None:
    assert not any(steps(lw.Engine(packed(matrices=("q", "k", "v")), cache_tokens=512)))


@torch.inference_mode()
def test_what_is_not_finite_stays_in_its_sequence() -> None:
    """Keys that are no numbers, left by one request, are never read for another."""
    engine = lw.Engine(packed(), cache_tokens=512)
    alone = engine.generate([PROMPTS[1]], GREEDY)[0].tokens
    for pool in engine.runner.pools:
        assert pool is not None
        for store in pool._stores():  # type: ignore[union-attr]
            store.fill_(float("nan"))
    fresh = lw.Engine(packed(), cache_tokens=512)
    fresh.runner.pools = engine.runner.pools
    assert fresh.generate([PROMPTS[1]], GREEDY)[0].tokens == alone
