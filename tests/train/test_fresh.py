"""A new decoder runs at once, predicts nothing in particular, and is the same for the same seed."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from layerwise.spec import Attention, FeedForward, LayerSpec, Norm, StackSpec
from layerwise.train.fresh import fresh
from layerwise.train.heal import next_token_loss
from layerwise.train.loop import Recipe, train

ROW = LayerSpec(Attention(heads=4, kv_heads=2, head_dim=16), FeedForward(128))
SPEC = StackSpec("llama", 64, 211, (ROW,) * 3, dtype="float32", context=64)


def test_matrices_have_the_spread_of_their_inputs() -> None:
    down = fresh(SPEC).block(0).matrix("down").weight  # type: ignore[operator]
    assert float(down.std()) == pytest.approx(128**-0.5, rel=0.05)
    assert float(down.mean()) == pytest.approx(0, abs=0.01)


def test_norms_and_biases_start_neutral() -> None:
    mixer = Attention(4, 2, 16, qkv_bias=True, out_bias=True, qk_norm=True)
    stack = fresh(replace(SPEC, rows=(replace(ROW, mixer=mixer),)))
    vectors = {name: p for name, p in stack.decoder.named_parameters() if p.dim() == 1}
    assert {float(p.unique()) for name, p in vectors.items() if name.endswith("bias")} == {0.0}
    assert {float(p.unique()) for name, p in vectors.items() if "norm" in name} == {1.0}


def test_a_norm_with_an_offset_is_neutral_too() -> None:
    shifted = Norm(offset=1.0)
    spec = replace(SPEC, rows=(replace(ROW, norm=shifted),) * 3, final_norm=shifted)
    tokens_BT = torch.arange(20)[None]
    torch.testing.assert_close(fresh(spec)(tokens_BT), fresh(SPEC)(tokens_BT))


def test_the_seed_is_the_model() -> None:
    state = torch.random.get_rng_state()
    one, same, other = (fresh(SPEC, seed)(torch.arange(9)[None]) for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_it_is_stored_in_the_dtype_of_the_table() -> None:
    stack = fresh(replace(SPEC, dtype="bfloat16"))
    assert {p.dtype for p in stack.decoder.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in stack.decoder.parameters())


def test_it_learns_a_pattern() -> None:
    stack = fresh(replace(SPEC, tied=False))
    stack.decoder.requires_grad_(True)
    tokens_NT = (torch.arange(16)[None] + torch.arange(24)[:, None]) % 7
    losses = train(
        list(stack.decoder.parameters()),
        lambda t: next_token_loss(stack, t),
        tokens_NT,
        Recipe(steps=30, learning_rate=1e-2, warmup=5),
    )
    assert losses[0] > 0.8 * math.log(211) and losses[-1] < 0.3
