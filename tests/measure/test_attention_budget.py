"""Counts by hand, the layer's attention against a plain loop, and what windows leave out."""

from __future__ import annotations

import math

import pytest
import torch

from layerwise.errors import BadOption
from layerwise.measure.attention_budget import AttentionBudget, needed
from layerwise.measure.engine import measure
from layerwise.nets.decoder import Block
from layerwise.spec import Attention, FeedForward, LayerSpec, StateSpace
from layerwise.stack.decoder import Caches
from layerwise.testing import check_instrument
from layerwise.testing.stacks import random_stack

TOKENS_BT = torch.randint(97, (2, 24), generator=torch.Generator().manual_seed(0))


def test_counts_by_hand() -> None:
    weights_HS = torch.tensor([[0.1, 0.6, 0.2, 0.1], [0.25, 0.25, 0.25, 0.25], [0.0, 0.0, 4.0, 0.0]])
    assert needed(weights_HS, 0.5).tolist() == [1, 2, 1]
    assert needed(weights_HS, 0.75).tolist() == [2, 3, 1]
    assert needed(weights_HS, 0.99).tolist() == [4, 4, 1]


def test_a_layer_that_looks_everywhere_alike_needs_the_share() -> None:
    stack = random_stack(2)
    block = stack.block(1)
    assert isinstance(block, Block)
    torch.nn.init.zeros_(block.matrix("q").weight)  # type: ignore[arg-type]
    scores = measure(stack, TOKENS_BT, [AttentionBudget(mass=0.7, window=1)], progress=False)
    assert scores["attention-budget"].values[1] == 17  # of 24 tokens, 0.7 * 24 = 16.8
    assert scores["attention-budget:no sinks"].values[1] == 14


@pytest.mark.parametrize("window", [1, 5, 40])
def test_attention_is_that_of_a_loop_over_cached_keys(window: int) -> None:
    stack, layer = random_stack(3), 2
    caches: Caches = {}
    state = stack.run(stack.start(TOKENS_BT, caches=caches), slice(0, layer))
    block, mixer = stack.block(layer), stack.spec.rows[layer].mixer
    assert isinstance(block, Block) and block.attention is not None and isinstance(mixer, Attention)
    body = block.attention.body
    q_BHTD, _, _ = body._queries_and_keys(block.attention.norm(state.hidden), state.shared)
    stack.run(state, slice(layer, layer + 1))
    keys = caches[layer].k
    assert keys is not None
    counts = []
    for row in range(2):
        for head in range(mixer.heads):
            sums = [0.0] * 24
            for query in range(max(0, 24 - window), 24):
                key_SD = keys[row, head // (mixer.heads // mixer.kv_heads), : query + 1].double()
                weights_S = (key_SD @ q_BHTD[row, head, query].double() / math.sqrt(mixer.head_dim)).softmax(0)
                for key, weight in enumerate(weights_S.tolist()):
                    sums[key] += weight
            reached, count = 0.0, 0
            for weight in sorted(sums, reverse=True):
                if reached >= 0.9 * sum(sums):
                    break
                reached, count = reached + weight, count + 1
            counts.append(count)
    found = measure(stack, TOKENS_BT, [AttentionBudget(window=window)], progress=False)["attention-budget"]
    assert found.values[layer] == pytest.approx(sum(counts) / len(counts))


def test_the_output_needs_more_keys_the_nearer_it_must_be() -> None:
    near, nearer = (measure(random_stack(3), TOKENS_BT, [AttentionBudget(cosine=cosine)], progress=False)
                    ["attention-budget:output"].values for cosine in (0.5, 0.999))
    assert all(1 <= low < high <= 24 for low, high in zip(near, nearer, strict=True))


def test_the_contract_holds_where_layers_share_keys_and_have_windows() -> None:
    from tests.serve.plain import KINDS

    for kind in ("windows", "shared", "no attention"):
        check_instrument(AttentionBudget(window=4), KINDS[kind].stack())


@pytest.mark.parametrize("options", [{"mass": 1.0}, {"cosine": 0.0}, {"window": 0}])
def test_what_makes_no_sense_is_refused(options: dict[str, float]) -> None:
    with pytest.raises(BadOption, match="attention-budget"):
        AttentionBudget(**options)  # type: ignore[arg-type]


def test_a_layer_without_attention_has_none() -> None:
    space = LayerSpec(StateSpace(heads=8, head_dim=8, state=4), None)
    stack = random_stack(rows=(space, LayerSpec(Attention(4, 2, 16), FeedForward(64))))
    values = measure(stack, TOKENS_BT, [AttentionBudget()])["attention-budget"].values
    assert math.isnan(values[0]) and values[1] >= 1
