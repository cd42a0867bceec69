"""Rows of any kind run together; blocks share what is not edited; caches and masks hold what they should."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from layerwise.nets.decoder import Decoder
from layerwise.nets.flow import Flow, LayerCache, frequencies
from layerwise.nets.packed import PackedEmbedding, PackedLinear
from layerwise.spec import Attention, FeedForward, Format, LayerSpec, Norm, Rope, StackSpec

ROW = LayerSpec(Attention(4, 2, 8), FeedForward(48))
ROWS = {
    "plain": ROW,
    "no attention": replace(ROW, mixer=None),
    "no feed-forward": replace(ROW, feed_forward=None),
    "nothing": replace(ROW, mixer=None, feed_forward=None),
    "window": replace(ROW, mixer=replace(ROW.mixer, window=3)),
    "wide window": replace(ROW, mixer=replace(ROW.mixer, window=100)),
    "one head": replace(ROW, mixer=Attention(1, 1, 16, rope=None)),
    "capped": replace(ROW, mixer=replace(ROW.mixer, softcap=5.0, window=3)),
    "normed": replace(ROW, mixer=replace(ROW.mixer, qk_norm=True), post_norm=True, norm=Norm(offset=1.0)),
    "ungated": LayerSpec(Attention(4, 4, 8, qkv_bias=True, out_bias=True),
                         FeedForward(20, gated=False, activation="gelu", bias=True), Norm("layer")),
    "experts": replace(ROW, feed_forward=FeedForward(16, experts=3, experts_per_token=2)),
    "packed": replace(ROW, formats={"q": Format(8, 0, True), "o": Format(4, 32), "up": Format(3, 16)}),
    "packed experts": replace(ROW, feed_forward=FeedForward(16, experts=3, experts_per_token=1),
                              formats={"gate": Format(8, 16), "down": Format(4, 16)}),
}


def stack(*rows: LayerSpec, **changes: Any) -> StackSpec:
    return replace(StackSpec("mixed", 32, 61, rows, dtype="float32"), **changes)


def random(spec: StackSpec) -> Decoder:
    generator = torch.Generator().manual_seed(0)
    decoder = Decoder(spec).requires_grad_(False).eval()
    for name, tensor in decoder.state_dict().items():
        if "codes" in name:
            tensor.copy_(torch.randint(1, 100, tensor.shape, generator=generator))
        elif name.endswith(("scale", "zero")):
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 1e-3)
        else:
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
    return decoder


def tokens(batch: int = 2, length: int = 11) -> Tensor:
    return torch.randint(61, (batch, length), generator=torch.Generator().manual_seed(1))


def run(decoder: Decoder, tokens_BT: Tensor, **flow: Any) -> Tensor:
    past = flow.get("past", 0)
    positions_BT = torch.arange(past, past + tokens_BT.shape[1]).expand(len(tokens_BT), -1)
    with torch.inference_mode():
        return decoder(tokens_BT, Flow(positions_BT, **flow))


@pytest.mark.parametrize("name", ROWS)
def test_decoding_with_a_cache_agrees_with_prefill(name: str) -> None:
    decoder = random(stack(ROWS[name], ROW, ROWS[name]))
    whole_BTV = run(decoder, tokens())
    assert torch.isfinite(whole_BTV).all()
    caches: dict[int, LayerCache] = {}
    pieces = [run(decoder, tokens()[:, a:b], caches=caches, past=a) for a, b in ((0, 4), (4, 5), (5, 9), (9, 11))]
    torch.testing.assert_close(torch.cat(pieces, 1), whole_BTV, rtol=1e-4, atol=1e-4)


def test_rows_of_every_kind_in_one_stack() -> None:
    spec = stack(*ROWS.values(), tied=False, embedding_format=Format(8, 16), head_format=Format(4, 32),
                 embedding_scale=3.0, learned_positions=16, logit_softcap=10.0, final_norm=Norm("layer"))
    decoder = random(spec)
    assert run(decoder, tokens()).abs().max() <= 10.0
    assert sum(tensor.nbytes for tensor in decoder.state_dict().values()) == spec.bytes()


@pytest.mark.parametrize("name", ROWS)
def test_the_future_does_not_matter(name: str) -> None:
    decoder = random(stack(ROWS[name], ROWS[name]))
    changed_BT = tokens().clone()
    changed_BT[:, 7:] = 5
    torch.testing.assert_close(run(decoder, changed_BT)[:, :7], run(decoder, tokens())[:, :7])


def test_a_window_forgets_what_is_behind_it() -> None:
    decoder = random(stack(ROWS["window"]))
    changed_BT = tokens().clone()
    changed_BT[:, 0] = (changed_BT[:, 0] + 1) % 61
    before, after = run(decoder, tokens()), run(decoder, changed_BT)
    assert not torch.allclose(before[:, 2], after[:, 2])
    torch.testing.assert_close(before[:, 3:], after[:, 3:])


def test_a_row_of_nothing_is_the_identity() -> None:
    with_it, without = random(stack(ROWS["nothing"])), random(stack())
    torch.testing.assert_close(run(with_it, tokens()), run(without, tokens()))


@pytest.mark.parametrize("window", [None, 3])
def test_a_high_cap_is_no_cap(window: int | None) -> None:
    mixer = Attention(4, 2, 8, window=window)
    plain, capped = (random(stack(replace(ROW, mixer=replace(mixer, softcap=cap)))) for cap in (None, 1e5))
    torch.testing.assert_close(run(capped, tokens()), run(plain, tokens()), rtol=1e-4, atol=1e-4)


def test_a_tied_head_reads_the_embedding() -> None:
    decoder = random(stack(ROW))
    x_BTC = torch.randn(1, 2, 32)
    torch.testing.assert_close(decoder.logits(x_BTC), decoder.norm(x_BTC) @ decoder.embedding.weight.T)
    assert "head.weight" not in decoder.state_dict()


def test_packed_tables_compute_what_their_dense_values_do() -> None:
    spec = stack(ROW, embedding_format=Format(8, 16))
    decoder = random(spec)
    dense = random(replace(spec, embedding_format=None))
    assert isinstance(decoder.embedding, PackedEmbedding)
    dense.load_state_dict({name: value for name, value in decoder.state_dict().items() if "embedding" not in name},
                          strict=False)
    dense.embedding.weight.copy_(decoder.embedding.dense())
    torch.testing.assert_close(run(decoder, tokens()), run(dense, tokens()), rtol=1e-4, atol=1e-4)


# blocks -------------------------------------------------------------------------------------------


def test_a_block_knows_its_matrices() -> None:
    decoder = random(stack(ROW, ROWS["no attention"], ROWS["ungated"]))
    assert [list(block.matrices()) for block in decoder.layers] == [
        ["q", "k", "v", "o", "gate", "up", "down"], ["gate", "up", "down"], ["q", "k", "v", "o", "up", "down"]]
    with pytest.raises(KeyError, match="no attention, so no matrix 'q'"):
        decoder.layers[1].matrix("q")


def test_a_row_with_formats_is_made_of_packed_matrices() -> None:
    block = random(stack(ROWS["packed"])).layers[0]
    packed = {name for name, matrix in block.matrices().items() if isinstance(matrix, PackedLinear)}
    assert packed == {"q", "o", "up"}


def test_an_edited_block_shares_the_rest_and_leaves_the_first_alone() -> None:
    block = random(stack(ROW)).layers[0]
    new = nn.Linear(32, 32, bias=False)
    edited = block.with_matrices({"q": new})
    assert edited.matrix("q") is new
    assert block.matrix("q") is not new
    assert all(edited.matrix(name) is block.matrix(name) for name in ("k", "v", "o", "gate", "up", "down"))
    assert {id(p) for p in edited.parameters()} - {id(p) for p in block.parameters()} == {id(new.weight)}


@pytest.mark.parametrize("part", ["attention", "feed_forward"])
def test_a_block_without_a_half(part: Any) -> None:
    block = random(stack(ROW)).layers[0]
    edited = block.without(part)
    assert getattr(edited, part) is None
    assert getattr(block, part) is not None
    names = {name for name in block.state_dict() if not name.startswith(f"{part}.")}
    assert set(edited.state_dict()) == names


def test_hooks_stay_with_the_block_they_were_put_on() -> None:
    block = random(stack(ROW)).layers[0]
    calls: list[int] = []
    block.attention.register_forward_hook(lambda *_: calls.append(1))
    edited = block.with_matrices({"q": nn.Linear(32, 32)})
    with torch.inference_mode():
        edited(torch.randn(1, 3, 32), Flow(torch.arange(3)[None]), 0)
    assert not calls


# flow ---------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(past=st.integers(0, 6), new=st.integers(1, 6), window=st.none() | st.integers(1, 14),
       padding=st.none() | st.lists(st.booleans(), min_size=12, max_size=12))
def test_a_mask_shows_what_the_rule_says(past: int, new: int, window: int | None,
                                         padding: list[bool] | None) -> None:
    total = past + new
    valid_BS = None if padding is None else torch.tensor(padding[:total])[None]
    mask = Flow(torch.arange(past, total)[None], valid_BS, past=past).mask(window)
    if mask is None:  # plain causal order, which the kernel knows by itself
        assert padding is None
        assert past == 0 or new == 1
        assert window is None or window >= total
        return
    for row in range(new):
        for key in range(total):
            at = past + row
            seen = key <= at and (window is None or key > at - window)
            real = padding is None or padding[key] or key == at
            assert bool(mask[0, 0, row, key]) == (seen and real)


def test_a_cache_grows_and_keeps_what_it_holds() -> None:
    cache = LayerCache()
    parts = [torch.randn(2, 3, length, 4) for length in (5, 1, 70, 1, 200)]
    for part in parts:
        k, v = cache.append(part, -part)
    assert k.equal(torch.cat(parts, 2))
    assert v.equal(-torch.cat(parts, 2))
    assert cache.length == 277


@pytest.mark.parametrize("rope", [Rope(), Rope(5e5, "linear", 4.0), Rope(5e5, "llama3", 8.0, 1.0, 4.0, 64)])
def test_frequencies_are_transformers_own(rope: Rope) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    given = {"rope_type": rope.kind, "rope_theta": rope.theta, "factor": rope.factor,
             "low_freq_factor": rope.low_frequency_factor, "high_freq_factor": rope.high_frequency_factor,
             "original_max_position_embeddings": rope.original_context}
    keys = {"default": 2, "linear": 3, "llama3": 6}[rope.kind]
    config = LlamaConfig(hidden_size=64, num_attention_heads=2, rope_parameters=dict(list(given.items())[:keys]))
    torch.testing.assert_close(frequencies(rope, 32), LlamaRotaryEmbedding(config).inv_freq)
