"""Controls that several systems share: the same model without its structure."""

from __future__ import annotations

import torch
from torch import nn

from layerwise.errors import BadOption
from layerwise.nets.decoder import Block
from layerwise.stack.base import Stack
from layerwise.stack.decoder import DecoderStack


def shuffled_weights(stack: Stack, seed: int) -> DecoderStack:
    """A copy in which the entries of every layer's matrices are permuted: same values, no structure.

    Embedding, norms and head are kept. Raises BadOption for a stack that is no dense decoder.
    """
    if not isinstance(stack, DecoderStack) or stack.spec.packed():
        raise BadOption(
            f"shuffling the weights of {stack.name}",
            expected="a dense decoder",
            do="use the model before it was packed",
        )
    generator = torch.Generator().manual_seed(seed)
    blocks = []
    for layer in range(len(stack)):
        block = stack.block(layer)
        assert isinstance(block, Block)
        blocks.append(
            block.with_matrices(
                {name: _shuffled(matrix, generator) for name, matrix in block.matrices().items()}
            )
        )
    return stack.rebuilt(stack.spec, blocks)


def _shuffled(matrix: nn.Module, generator: torch.Generator) -> nn.Linear:
    assert isinstance(matrix, nn.Linear)
    weight = matrix.weight.detach()
    order = torch.randperm(weight.numel(), generator=generator)
    with torch.device("meta"):
        twin = nn.Linear(matrix.in_features, matrix.out_features, bias=matrix.bias is not None)
    twin.weight = nn.Parameter(weight.flatten()[order].view_as(weight), requires_grad=False)
    twin.bias = matrix.bias
    return twin
