"""What weights are before training: Gaussian matrices, norms one, biases zero, or as a module itself draws them."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from layerwise.errors import BadOption


def initial(path: str, weight: Tensor, norm_offset: float, generator: torch.Generator) -> Tensor:
    """Values of the shape of `weight`, float32: standard deviation 1 / sqrt(inputs) for matrices.

    `norm_offset` is what a norm adds to its weight.
    """
    if weight.dim() > 1:
        return torch.randn(weight.shape, generator=generator) / math.sqrt(weight.shape[-1])
    return torch.full(weight.shape, 0.0 if path.endswith("bias") else 1.0 - norm_offset)


def reset(block: nn.Module, norm_offset: float, generator: torch.Generator) -> nn.Module:
    """A copy of a decoder's layer with initial weights. Raises BadOption where some are packed integers."""
    twin = copy.deepcopy(block)
    if any(not weight.is_floating_point() for weight in twin.state_dict().values()):
        raise BadOption("initial weights for a layer of packed integers", expected="dense weights",
                        do="use the model before it was quantized")
    for path, weight in twin.named_parameters():
        weight.data = initial(path, weight, norm_offset, generator).to(weight)
    return twin


def redrawn(block: nn.Module, generator: torch.Generator) -> nn.Module:
    """A copy of any block with new weights: `reset_parameters` where a part has it, `initial` for the rest.

    Statistics that a batch norm keeps begin anew too.
    """
    twin = copy.deepcopy(block)
    drawn: set[nn.Parameter] = set()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
        for part in twin.modules():
            if callable(anew := getattr(part, "reset_parameters", None)):
                anew()
                drawn.update(part.parameters(recurse=False))
    for path, weight in twin.named_parameters():
        if weight not in drawn:
            weight.data = initial(path, weight, 0.0, generator).to(weight)
    return twin
