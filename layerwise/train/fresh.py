"""A new decoder with initial weights, for training from scratch or for trying things on."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from layerwise.nets.decoder import Decoder
from layerwise.spec import StackSpec
from layerwise.stack.decoder import DecoderStack


def fresh(spec: StackSpec, seed: int = 0, name: str = "fresh") -> DecoderStack:
    """A decoder of Gaussian weights with standard deviation 1 / sqrt(inputs); norms one, biases zero."""
    with torch.device("meta"):
        decoder = Decoder(spec)
    generator = torch.Generator().manual_seed(seed)
    tensors = {path: _values(spec, path, weight, generator) for path, weight in decoder.named_parameters()}
    decoder.load_state_dict(tensors, assign=True)
    return DecoderStack(decoder.requires_grad_(False).eval(), name=name)


def _values(spec: StackSpec, path: str, weight: Tensor, generator: torch.Generator) -> Tensor:
    if weight.dim() > 1:
        values = torch.randn(weight.shape, generator=generator) / math.sqrt(weight.shape[-1])
    else:
        values = torch.full(weight.shape, 0.0 if path.endswith("bias") else 1.0 - _offset(spec, path))
    return values.to(getattr(torch, spec.dtype))


def _offset(spec: StackSpec, path: str) -> float:
    norm = spec.rows[int(path.split(".")[1])].norm if path.startswith("layers.") else spec.final_norm
    return norm.offset
