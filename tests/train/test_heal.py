"""Healing changes what it should and nothing else, merges exactly, and recovers what a transform cost."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import layerwise as lw
from layerwise.allocate.plan import Edit
from layerwise.errors import BadOption
from layerwise.spec import Attention, FeedForward, LayerSpec
from layerwise.stack.decoder import DecoderStack
from layerwise.testing.stacks import random_stack
from layerwise.train.heal import Lora, Partial, heal, next_token_loss
from layerwise.train.loop import Recipe, train
from layerwise.train.methods import _adapt, _merge, untied

RECIPE = Recipe(steps=12, batch=4, learning_rate=3e-3, warmup=2)


@pytest.fixture
def stack() -> DecoderStack:
    return random_stack(4, hidden=32)


@pytest.fixture
def tokens_NT() -> Tensor:
    """Counting, from different numbers: easily learnt."""
    return (torch.arange(20)[None] + torch.arange(16)[:, None]) % 11


def changed(before: DecoderStack, after: DecoderStack) -> set[str]:
    """Names of the tensors that differ, a new head against the embedding it was copied from."""
    old = dict(before.tensors())
    return {
        name
        for name, tensor in after.tensors()
        if not torch.equal(tensor, old["embedding.weight" if name not in old else name])
    }


def test_the_loss_is_that_of_the_next_token(stack: DecoderStack, tokens_NT: Tensor) -> None:
    log_BTV = stack(tokens_NT).double().log_softmax(-1)
    rows = [[-log_BTV[b, t, tokens_NT[b, t + 1]] for t in range(19)] for b in range(16)]
    expected = torch.stack([value for row in rows for value in row]).mean()
    assert float(next_token_loss(stack, tokens_NT)) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("method", [Partial(0), Partial(2), Partial(2, head=False), Lora(rank=4)])
def test_healing_lowers_the_loss_and_leaves_the_original_alone(
    stack: DecoderStack, tokens_NT: Tensor, method: Partial | Lora
) -> None:
    before = {name: tensor.clone() for name, tensor in stack.tensors()}
    healed, losses = heal(stack, tokens_NT, method, RECIPE)
    assert len(losses) == RECIPE.steps
    assert float(next_token_loss(healed, tokens_NT)) < 0.9 * float(next_token_loss(stack, tokens_NT))
    assert all(torch.equal(tensor, before[name]) for name, tensor in stack.tensors())
    assert not any(p.requires_grad for part in (stack, healed) for p in part.decoder.parameters())
    assert not healed.decoder.training


@pytest.mark.parametrize("layers", [0, 1, 4])
@pytest.mark.parametrize("head", [True, False])
def test_partial_changes_the_last_layers_the_norm_and_the_head(
    stack: DecoderStack, tokens_NT: Tensor, layers: int, head: bool
) -> None:
    healed, _ = heal(stack, tokens_NT, Partial(layers, head), RECIPE)
    last = {f"layers.{layer}" for layer in range(4 - layers, 4)}
    expected = {name for name, _ in stack.tensors() if any(name.startswith(f"{layer}.") for layer in last)}
    assert changed(stack, healed) == expected | {"norm.weight"} | ({"head.weight"} if head else set())
    assert healed.spec.tied is not head


def test_lora_changes_every_matrix_and_no_other_tensor(stack: DecoderStack, tokens_NT: Tensor) -> None:
    healed, _ = heal(stack, tokens_NT, Lora(), RECIPE)
    matrices = {name for name, tensor in stack.tensors() if name.startswith("layers.") and tensor.dim() > 1}
    assert changed(stack, healed) == matrices
    assert [name for name, _ in healed.tensors()] == [name for name, _ in stack.tensors()]
    assert healed.spec == stack.spec


def test_merged_adapters_compute_what_the_adapters_did(stack: DecoderStack, tokens_NT: Tensor) -> None:
    twin = stack.copied()
    _adapt(twin, Lora(dropout=0.0))
    parameters = [p for p in twin.decoder.parameters() if p.requires_grad]
    assert sum(p.numel() for p in parameters) == adapter_size(stack, rank=8)
    train(parameters, lambda tokens_BT: next_token_loss(twin, tokens_BT), tokens_NT, RECIPE)
    before_BTV = twin(tokens_NT).detach()
    _merge(twin.decoder)
    assert [name for name, _ in twin.tensors()] == [name for name, _ in stack.tensors()]
    assert not torch.allclose(before_BTV, stack(tokens_NT), atol=1e-2)
    torch.testing.assert_close(twin(tokens_NT), before_BTV, rtol=1e-4, atol=1e-4)


def adapter_size(stack: DecoderStack, rank: int) -> int:
    shapes = [shape for row in stack.spec.rows for shape in row.matrices(stack.spec.hidden).values()]
    return sum(rank * (outputs + inputs) for outputs, inputs in shapes)


def test_adapters_change_nothing_before_they_are_trained(stack: DecoderStack, tokens_NT: Tensor) -> None:
    healed, _ = heal(stack, tokens_NT, Lora(), replace(RECIPE, steps=0))
    assert changed(stack, healed) == set()


def test_the_seed_decides_and_the_global_generator_is_left_alone(stack: DecoderStack, tokens_NT: Tensor) -> None:
    state = torch.random.get_rng_state()
    losses = [heal(stack, tokens_NT, Lora(), replace(RECIPE, steps=4, seed=seed))[1] for seed in (1, 1, 2)]
    assert losses[0] == losses[1] != losses[2]
    assert torch.equal(torch.random.get_rng_state(), state)


def test_untied_keeps_the_logits_and_shares_nothing(stack: DecoderStack, tokens_NT: Tensor) -> None:
    apart = untied(stack)
    assert torch.equal(apart(tokens_NT), stack(tokens_NT))
    assert not apart.spec.tied and stack.spec.tied
    tables = dict(apart.tensors())
    assert tables["head.weight"].data_ptr() != tables["embedding.weight"].data_ptr()
    assert apart.spec.parameters() == stack.spec.parameters() + 97 * 32
    assert untied(apart) is apart


def test_another_loss_may_be_given(stack: DecoderStack, tokens_NT: Tensor) -> None:
    def towards_seven(trained: DecoderStack, tokens_BT: Tensor) -> Tensor:
        return -trained(tokens_BT).log_softmax(-1)[..., 7].mean()

    healed, losses = heal(stack, tokens_NT, Partial(1), RECIPE, loss=towards_seven)
    assert losses[-1] < losses[0]
    assert float(towards_seven(healed, tokens_NT)) < float(towards_seven(stack, tokens_NT))


def test_healing_brings_back_part_of_what_dropping_a_layer_cost(stack: DecoderStack, tokens_NT: Tensor) -> None:
    taught, _ = heal(stack, tokens_NT, Partial(4), replace(RECIPE, steps=40))
    plan = lw.Plan(taught.spec.fingerprint(), 4, (Edit(1, "drop"),))
    cut = lw.apply(taught, plan)
    losses = [
        float(next_token_loss(model, tokens_NT)) for model in (taught, cut, heal(cut, tokens_NT, Lora(), RECIPE)[0])
    ]
    assert losses[0] < losses[2] < losses[1]


def test_layers_without_a_half_are_healed_too(stack: DecoderStack, tokens_NT: Tensor) -> None:
    plan = lw.Plan(
        stack.spec.fingerprint(), 4, (Edit(1, "drop", {"part": "attention"}), Edit(2, "drop", {"part": "feed_forward"}))
    )
    cut = lw.apply(stack, plan)
    for method in (Lora(), Partial(4)):
        healed, _ = heal(cut, tokens_NT, method, replace(RECIPE, steps=2))
        assert healed.spec.rows == cut.spec.rows


def test_the_healed_stack_is_stored_as_the_original_was(tokens_NT: Tensor) -> None:
    stack = random_stack(2, hidden=32, dtype="bfloat16")
    for method in (Lora(), Partial(1)):
        healed, _ = heal(stack, tokens_NT, method, replace(RECIPE, steps=2))
        assert healed.spec.dtype == "bfloat16"
        assert {tensor.dtype for _, tensor in healed.tensors()} == {torch.bfloat16}


def test_a_mixture_of_experts_is_healed_in_its_last_layers(tokens_NT: Tensor) -> None:
    row = LayerSpec(Attention(4, 2, 8), FeedForward(32, experts=4, experts_per_token=2))
    stack = random_stack(2, hidden=32, row=row)
    healed, losses = heal(stack, tokens_NT, Partial(2), RECIPE)
    assert losses[-1] < losses[0] and changed(stack, healed) >= {"norm.weight", "head.weight"}


def test_adapters_on_packed_matrices_are_refused(stack: DecoderStack, tokens_NT: Tensor) -> None:
    packed = lw.apply(stack, lw.Plan(stack.spec.fingerprint(), 4, (Edit(0, "quantize", {"bits": 8}),)))
    with pytest.raises(BadOption, match="packed"):
        heal(packed, tokens_NT, Lora())


@pytest.mark.parametrize("layers", [-1, 5])
def test_more_layers_than_there_are_cannot_be_trained(stack: DecoderStack, tokens_NT: Tensor, layers: int) -> None:
    with pytest.raises(BadOption, match="0 to 4"):
        heal(stack, tokens_NT, Partial(layers))
