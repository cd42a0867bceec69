"""Attention knock-out against a loop over heads, queries and keys in float64, and what must not matter."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from layerwise.errors import BadOption
from layerwise.nets.decoder import Block
from layerwise.nets.flow import Flow
from layerwise.spec import Attention, FeedForward, LayerSpec
from layerwise.stack.decoder import DecoderStack
from layerwise.stack.knockout import knockout
from layerwise.stack.module import ModuleStack
from layerwise.testing.stacks import random_stack

TOKENS = torch.randint(97, (2, 9), generator=torch.Generator().manual_seed(0))


def group(*positions: int, total: int = 9) -> Tensor:
    mask_1S = torch.zeros(1, total, dtype=torch.bool)
    mask_1S[0, list(positions)] = True
    return mask_1S


def loop(stack: DecoderStack, layer: int, x_BTC: Tensor, cut: set[tuple[int, int]], window: int | None) -> Tensor:
    """What attention adds, one head, query and key at a time; a query without keys sees itself."""
    block = stack.block(layer)
    assert isinstance(block, Block)
    assert block.attention is not None
    body, a = block.attention.body, stack.spec.rows[layer].mixer
    assert isinstance(a, Attention)
    y_BTC = block.attention.norm(x_BTC)
    batch, total, _ = x_BTC.shape
    out = torch.zeros(batch, total, a.heads * a.head_dim, dtype=torch.float64)
    flow = Flow(torch.arange(total).expand(batch, total))
    assert a.rope is not None
    cos, sin = flow.rotation(a.rope, a.head_dim)

    def rotated(x: Tensor) -> Tensor:
        return x * cos[0, 0] + x.roll(a.head_dim // 2, -1) * sin[0, 0]

    for row in range(batch):
        for head in range(a.heads):
            shared = head * a.kv_heads // a.heads
            q_TD, k_TD, v_TD = (
                getattr(body, name)(y_BTC[row]).view(total, -1, a.head_dim)[:, index]
                for name, index in (("q", head), ("k", shared), ("v", shared))
            )
            q_TD, k_TD, v_TD = rotated(q_TD).double(), rotated(k_TD).double(), v_TD.double()
            for query in range(total):
                first = 0 if window is None else max(0, query - window + 1)
                keys = [key for key in range(first, query + 1) if (query, key) not in cut] or [query]
                scores = [float(q_TD[query] @ k_TD[key]) / math.sqrt(a.head_dim) for key in keys]
                weights = [math.exp(score - max(scores)) for score in scores]
                mixed = sum(weight * v_TD[key] for weight, key in zip(weights, keys, strict=True)) / sum(weights)
                out[row, query, head * a.head_dim : (head + 1) * a.head_dim] = mixed
    added_BTC: Tensor = out @ body.o.weight.double().T
    return added_BTC


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize(("source", "target"), [((0, 1, 2), (5, 8)), ((0,), (0, 1)), ((8,), (8,))])
def test_it_equals_a_masked_softmax_in_a_loop(
    window: int | None, source: tuple[int, ...], target: tuple[int, ...]
) -> None:
    row = LayerSpec(Attention(heads=4, kv_heads=2, head_dim=16, window=window), FeedForward(width=32))
    stack = random_stack(2, row=row)
    cut = {(query, key) for query in target for key in source}
    with knockout(stack, group(*source), group(*target), [1]), stack.capture("input", "attention") as seen:
        stack(TOKENS)
    torch.testing.assert_close(
        seen[1, "attention"].double(), loop(stack, 1, seen[1, "input"], cut, window), atol=2e-5, rtol=1e-4
    )
    torch.testing.assert_close(
        seen[0, "attention"].double(), loop(stack, 0, seen[0, "input"], set(), window), atol=2e-5, rtol=1e-4
    )


def test_nothing_to_cut_changes_nothing_and_afterwards_all_is_as_before() -> None:
    stack = random_stack()
    plain = stack(TOKENS)
    with knockout(stack, group(), group(3, 4), range(4)):
        torch.testing.assert_close(stack(TOKENS), plain, atol=1e-5, rtol=1e-5)
    with knockout(stack, group(8), group(3, 4), range(4)):  # a later key is not seen anyway
        torch.testing.assert_close(stack(TOKENS), plain, atol=1e-5, rtol=1e-5)
    with pytest.raises(ZeroDivisionError), knockout(stack, group(0, 1), group(5), range(4)):
        assert not torch.equal(stack(TOKENS)[:, 5], plain[:, 5])
        raise ZeroDivisionError
    assert torch.equal(stack(TOKENS), plain)


def test_a_target_that_lost_a_source_in_every_layer_knows_nothing_of_it() -> None:
    """Every path from the source to the last position is cut, so another token there makes no difference."""
    stack = random_stack()
    other = TOKENS.clone()
    other[:, 2] = (other[:, 2] + 1) % 97
    with knockout(stack, group(2), group(3, 4, 5, 6, 7, 8), range(len(stack))):
        torch.testing.assert_close(stack(TOKENS)[:, 3:], stack(other)[:, 3:], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(stack(TOKENS)[:, 3:], stack(other)[:, 3:], atol=1e-3)


def test_rows_can_differ_and_batching_does_not_matter() -> None:
    stack = random_stack()
    source, target = torch.cat([group(0, 1), group(4)]), torch.cat([group(8), group(6, 7)])
    with knockout(stack, source, target, [0, 2]):
        both = stack(TOKENS)
    for row in range(2):
        with knockout(stack, source[row : row + 1], target[row : row + 1], [0, 2]):
            torch.testing.assert_close(stack(TOKENS[row : row + 1])[0], both[row], atol=1e-5, rtol=1e-5)


def test_padding_on_the_left_does_not_matter() -> None:
    stack = random_stack()
    padded, mask = torch.cat([TOKENS[:, :2], TOKENS], 1), torch.ones(2, 11, dtype=torch.bool)
    mask[:, :2] = False
    with knockout(stack, group(0, 1), group(8), range(4)):
        plain = stack(TOKENS)
    with knockout(stack, group(2, 3, total=11), group(10, total=11), range(4)):
        torch.testing.assert_close(stack(padded, mask)[:, 2:], plain, atol=1e-4, rtol=1e-4)


def test_decoding_with_caches_cuts_the_same_pairs() -> None:
    stack = random_stack()
    caches: dict[int, Any] = {}
    with knockout(stack, group(1, 2), group(6, 8), range(4)):
        whole = stack(TOKENS)
        pieces = [stack(TOKENS[:, :5], caches=caches)]
        pieces += [stack(TOKENS[:, t : t + 1], caches=caches) for t in range(5, 9)]
    torch.testing.assert_close(torch.cat(pieces, 1), whole, atol=1e-4, rtol=1e-4)


def test_positions_beyond_the_masks_are_in_no_group() -> None:
    stack = random_stack()
    with knockout(stack, group(0), group(3), range(4)):
        long = stack(TOKENS)
    with knockout(stack, group(0, total=4), group(3, total=4), range(4)):
        assert torch.equal(stack(TOKENS), long)


def test_layers_without_attention_are_passed_over() -> None:
    stack = random_stack()
    with stack.skip(1), knockout(stack, group(0), group(8), range(4)):
        stack(TOKENS)


def test_what_cannot_be_cut_is_refused() -> None:
    with pytest.raises(BadOption, match="knock-out"), knockout(
        ModuleStack(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))), group(0), group(1), [0]
    ):
        pass
    with pytest.raises(BadOption, match="shapes"), knockout(random_stack(), group(0), group(1, total=8), [0]):
        pass
    with pytest.raises(BadOption, match="layer 4"), knockout(random_stack(), group(0), group(1), [4]):
        pass
