"""A head alone: the parts add up, and a layer of one head is left as it is."""

from __future__ import annotations

import pytest
import torch

from layerwise.errors import BadOption
from layerwise.nets.decoder import Block
from layerwise.spec import Attention, FeedForward, LayerSpec
from layerwise.stack.heads import only_head
from layerwise.testing.stacks import random_stack

TOKENS = torch.randint(97, (2, 7), generator=torch.Generator().manual_seed(0))


def test_heads_alone_add_up_to_the_whole_layer() -> None:
    stack = random_stack()
    with stack.capture("attention") as seen:
        stack(TOKENS)
    parts = []
    for head in range(4):
        with only_head(stack, 2, head), stack.capture("attention", layers=range(2, 3)) as alone:
            stack(TOKENS)
        parts.append(alone[2, "attention"])
    torch.testing.assert_close(torch.stack(parts).sum(0), seen[2, "attention"], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(parts[0], parts[1], atol=1e-2)


@pytest.mark.parametrize("others", [0.0, 0.3])
def test_it_equals_scaling_columns_of_the_output_matrix(others: float) -> None:
    stack = random_stack()
    block = stack.block(1)
    assert isinstance(block, Block)
    scale = torch.full((64,), others)
    scale[16:32] = 1
    twin = torch.nn.Linear(64, 64, bias=False)
    twin.weight.data = block.matrix("o").weight * scale
    with stack.swap(1, block.with_matrices({"o": twin})):
        expected = stack(TOKENS)
    plain = stack(TOKENS)
    with only_head(stack, 1, 1, others):
        torch.testing.assert_close(stack(TOKENS), expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(stack(TOKENS), plain)


def test_a_single_head_is_alone_already_and_others_do_not_exist() -> None:
    stack = random_stack(row=LayerSpec(Attention(1, 1, 16), FeedForward(32)))
    with only_head(stack, 0, 0):
        torch.testing.assert_close(stack(TOKENS), stack(TOKENS))
    with pytest.raises(BadOption, match="head 1 of layer 0"), only_head(stack, 0, 1):
        pass
