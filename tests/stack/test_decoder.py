"""A decoder run slice by slice, cached, padded and streamed equals the whole decoder."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from layerwise.errors import BadModel, BadOption
from layerwise.nets.decoder import Block, Decoder
from layerwise.nets.flow import Flow
from layerwise.spec import Attention, FeedForward, LayerSpec, Norm, Rope, StackSpec
from layerwise.stack import DecoderStack

ATTENTION = Attention(heads=4, kv_heads=2, head_dim=8)
SLIDING = replace(ATTENTION, window=3, qk_norm=True, rope=Rope(theta=100.0))
ROWS: dict[str, tuple[LayerSpec, ...]] = {
    "plain": (LayerSpec(ATTENTION, FeedForward(64)),) * 4,
    "sliding, post-norm": (LayerSpec(SLIDING, FeedForward(64), norm=Norm(offset=1.0), post_norm=True),
                           LayerSpec(replace(ATTENTION, softcap=5.0), FeedForward(64), post_norm=True)) * 2,
    "biases, layer norm": (LayerSpec(replace(ATTENTION, rope=None, kv_heads=4, qkv_bias=True, out_bias=True),
                                     FeedForward(64, gated=False, bias=True), norm=Norm("layer")),) * 4,
    "experts": (LayerSpec(ATTENTION, FeedForward(16, experts=4, experts_per_token=2)),) * 4,
    "missing halves": (LayerSpec(ATTENTION, None), LayerSpec(None, FeedForward(64)),
                       LayerSpec(ATTENTION, FeedForward(24)), LayerSpec(ATTENTION, FeedForward(64))),
}

CLOSE: dict[str, float] = {"atol": 1e-4, "rtol": 1e-5}  # float32 sums in another order, logits up to 40


@pytest.fixture(params=ROWS)
def stack(request: pytest.FixtureRequest) -> DecoderStack:
    learned = 64 if request.param == "biases, layer norm" else 0
    spec = StackSpec(family="tiny", hidden=32, vocabulary=97, rows=ROWS[request.param], dtype="float32",
                     learned_positions=learned)
    torch.manual_seed(0)
    return DecoderStack(Decoder(spec).requires_grad_(False).eval())


@pytest.fixture
def tokens_BT() -> Tensor:
    return torch.randint(97, (2, 11), generator=torch.Generator().manual_seed(1))


def positions(tokens_BT: Tensor) -> Tensor:
    return torch.arange(tokens_BT.shape[1]).expand(tokens_BT.shape)


# slices -----------------------------------------------------------------------------------------


def test_equals_the_decoder_itself(stack: DecoderStack, tokens_BT: Tensor) -> None:
    assert torch.equal(stack(tokens_BT), stack.decoder(tokens_BT, Flow(positions(tokens_BT))))


def test_every_split_equals_the_whole(stack: DecoderStack, tokens_BT: Tensor) -> None:
    whole = stack(tokens_BT)
    for cut in range(len(stack) + 1):
        state = stack.run(stack.start(tokens_BT), slice(0, cut))
        assert state.layer == cut
        assert torch.equal(stack.finish(stack.run(state)), whole)


def test_skipping_equals_a_decoder_without_the_layer(stack: DecoderStack, tokens_BT: Tensor) -> None:
    for layer in range(len(stack)):
        kept = [stack.block(i) for i in range(len(stack)) if i != layer]
        expected = stack.rebuilt(stack.spec.with_rows({layer: None}), kept)(tokens_BT)
        with stack.skip(layer):
            assert torch.equal(stack(tokens_BT), expected)
        state = stack.run(stack.start(tokens_BT), slice(0, layer))
        assert torch.equal(stack.finish(stack.run(state, slice(layer + 1, None))), expected)


def test_a_state_can_be_continued_more_than_once(tiny_stack: DecoderStack, tokens_BT: Tensor) -> None:
    state = tiny_stack.run(tiny_stack.start(tokens_BT), slice(0, 2))
    first = tiny_stack.finish(tiny_stack.run(state))
    tiny_stack.run(state, slice(3, 4))
    assert torch.equal(tiny_stack.finish(tiny_stack.run(state)), first)


@pytest.mark.parametrize("layers", [slice(0, 5), slice(-1, 2), slice(0, 4, 2)])
def test_a_slice_outside_the_table_is_refused(tiny_stack: DecoderStack, layers: slice) -> None:
    with pytest.raises(BadOption, match=r"within 0\.\.4"):
        tiny_stack.run(tiny_stack.start(torch.zeros(1, 2, dtype=torch.int64)), layers)


# caches and padding -------------------------------------------------------------------------------


@pytest.mark.parametrize("cuts", [(11,), (10, 1), (4, 4, 3), (1,) * 11])
def test_cached_chunks_equal_one_pass(stack: DecoderStack, tokens_BT: Tensor, cuts: tuple[int, ...]) -> None:
    caches: Any = {}
    chunks = [stack(chunk_BT, caches=caches) for chunk_BT in tokens_BT.split(cuts, 1)]
    torch.testing.assert_close(torch.cat(chunks, 1), stack(tokens_BT), **CLOSE)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(stack: DecoderStack, tokens_BT: Tensor, side: str) -> None:
    lengths = (7, 11)
    mask_BT = torch.stack([torch.arange(11) < n for n in lengths])
    if side == "left":
        mask_BT = mask_BT.flip(1)
    padded_BT = torch.zeros_like(tokens_BT)
    for row, length in enumerate(lengths):
        padded_BT[row, mask_BT[row]] = tokens_BT[row, :length]
    logits_BTV = stack(padded_BT, mask_BT)
    assert bool(torch.isfinite(logits_BTV).all())
    for row, length in enumerate(lengths):
        alone_TV = stack(tokens_BT[row : row + 1, :length])[0]
        torch.testing.assert_close(logits_BTV[row, mask_BT[row]], alone_TV, **CLOSE)


def test_a_padded_batch_can_be_continued(stack: DecoderStack, tokens_BT: Tensor) -> None:
    caches: Any = {}
    mask_BS = torch.ones(2, 11, dtype=torch.bool)
    mask_BS[0, :4] = False
    stack(tokens_BT[:, :9], mask_BS[:, :9], caches=caches)
    steps = [stack(tokens_BT[:, t : t + 1], mask_BS[:, : t + 1], caches=caches) for t in (9, 10)]
    alone_TV = stack(tokens_BT[:1, 4:])[0]
    torch.testing.assert_close(torch.cat(steps, 1)[0], alone_TV[-2:], **CLOSE)


@pytest.mark.parametrize("token", [97, -1])
def test_tokens_outside_the_vocabulary_are_refused(tiny_stack: DecoderStack, token: int) -> None:
    with pytest.raises(BadOption, match=f"token {token}"):
        tiny_stack(torch.tensor([[0, token]]))


def test_a_batch_without_tokens_is_refused(tiny_stack: DecoderStack) -> None:
    with pytest.raises(BadOption, match="at least one token"):
        tiny_stack(torch.zeros(1, 0, dtype=torch.int64))


def test_a_mask_that_does_not_fit_is_refused(tiny_stack: DecoderStack, tokens_BT: Tensor) -> None:
    caches: Any = {}
    tiny_stack(tokens_BT[:, :8], caches=caches)
    with pytest.raises(BadOption, match=r"expected: \(2, 11\)"):
        tiny_stack(tokens_BT[:, 8:], torch.ones(2, 3, dtype=torch.bool), caches=caches)


# layers -----------------------------------------------------------------------------------------


def test_the_halves_sum_to_what_a_layer_adds(stack: DecoderStack, tokens_BT: Tensor) -> None:
    for layer, row in enumerate(stack.spec.rows):
        halves = [s for s, half in (("attention", row.mixer), ("feed_forward", row.feed_forward)) if half]
        with stack.capture("input", "output", *halves, layers=range(layer, layer + 1)) as seen:  # type: ignore[arg-type]
            stack(tokens_BT)
        added = sum(seen[layer, half] for half in halves)  # type: ignore[index]
        torch.testing.assert_close(seen[layer, "output"], seen[layer, "input"] + added, **CLOSE)


def test_a_missing_half_is_no_site(tiny_stack: DecoderStack) -> None:
    block: Any = tiny_stack.block(1)
    without = tiny_stack.swap(1, block.without("attention"))
    with without, pytest.raises(BadOption, match=r"site .attention. of layer 1"):
        tiny_stack.module(1, "attention")
    tiny_stack.module(1, "attention")


def test_knocking_out_a_half_equals_a_block_without_it(tiny_stack: DecoderStack, tokens_BT: Tensor) -> None:
    block = tiny_stack.block(2)
    assert isinstance(block, Block)
    for half in ("attention", "feed_forward"):
        with tiny_stack.swap(2, block.without(half)):  # type: ignore[arg-type]
            expected = tiny_stack(tokens_BT)
        with tiny_stack.zero(2, half):  # type: ignore[arg-type]
            torch.testing.assert_close(tiny_stack(tokens_BT), expected, atol=1e-6, rtol=1e-6)


def test_a_layer_that_is_not_there(tiny_stack: DecoderStack) -> None:
    with pytest.raises(BadOption, match="layer 4"), tiny_stack.skip(4):
        pass
    with pytest.raises(BadOption, match="layer -1"):
        tiny_stack.module(-1, "output")


def test_finite_names_the_tensor(tiny_stack: DecoderStack) -> None:
    tiny_stack.finite()
    tiny_stack.decoder.layers[1].attention.body.v.weight[0, 0] = float("nan")  # type: ignore[index, union-attr]
    with pytest.raises(BadModel, match=r"layers\.1\.attention\.body\.v\.weight"):
        tiny_stack.finite()


# streaming --------------------------------------------------------------------------------------


class Held:
    """Stands for weights on disk; counts what is read."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder, self.reads = decoder, 0

    def layer(self, index: int) -> dict[str, Tensor]:
        self.reads += 1
        return dict(self.decoder.layers[index].state_dict())


@pytest.fixture
def streamed(tiny_stack: DecoderStack) -> DecoderStack:
    """A stack that reads its layers from `tiny_stack` each time they run."""
    decoder = Decoder(tiny_stack.spec).requires_grad_(False).eval()
    outside = {k: v for k, v in tiny_stack.decoder.state_dict().items() if not k.startswith("layers.")}
    decoder.load_state_dict(outside, strict=False)
    decoder.layers.to("meta")
    held: Any = Held(tiny_stack.decoder)
    return DecoderStack(decoder, weights=held)


def test_streaming_changes_nothing(tiny_stack: DecoderStack, streamed: DecoderStack,
                                   tokens_BT: Tensor) -> None:
    assert streamed.streamed and not tiny_stack.streamed
    assert torch.equal(streamed(tokens_BT), tiny_stack(tokens_BT))
    held: Any = streamed._weights
    assert held.reads == 4


def test_streamed_layers_can_be_seen_and_edited(tiny_stack: DecoderStack, streamed: DecoderStack,
                                                tokens_BT: Tensor) -> None:
    results = []
    for stack in (tiny_stack, streamed):
        with stack.zero(1, "attention"), stack.noise(2, "input", 0.1), stack.skip(0), \
                stack.capture("output", "attention", layers=range(1, 4)) as seen:
            results.append((stack(tokens_BT), dict(seen)))
    (resident, seen_resident), (read, seen_read) = results
    assert torch.equal(resident, read)
    assert seen_resident.keys() == seen_read.keys() and len(seen_read) == 6
    for key, value in seen_resident.items():
        assert torch.equal(value, seen_read[key])
    assert torch.equal(streamed(tokens_BT), tiny_stack(tokens_BT))


# copies -----------------------------------------------------------------------------------------


def test_a_copy_shares_nothing(tiny_stack: DecoderStack, tokens_BT: Tensor) -> None:
    before = tiny_stack(tokens_BT)
    twin = tiny_stack.copied()
    assert torch.equal(twin(tokens_BT), before)
    for parameter in twin.decoder.parameters():
        nn.init.zeros_(parameter)
    assert torch.equal(tiny_stack(tokens_BT), before)
    assert tiny_stack.copied(torch.bfloat16).spec.dtype == "bfloat16"
