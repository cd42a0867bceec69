"""A new decoder with initial weights, for training from scratch or for trying things on."""

from __future__ import annotations

import torch

from layerwise.nets.decoder import Decoder
from layerwise.spec import StackSpec
from layerwise.stack.decoder import DecoderStack


def fresh(spec: StackSpec, seed: int = 0, name: str = "fresh") -> DecoderStack:
    """A decoder of Gaussian weights with standard deviation 1 / sqrt(inputs); norms one, biases zero."""
    decoder = Decoder(spec)
    generator = torch.Generator().manual_seed(seed)
    for path, parameter in decoder.named_parameters():
        if parameter.dim() > 1:
            values = torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5
        elif path.endswith("bias"):
            values = torch.zeros(parameter.shape)
        else:
            values = torch.full(parameter.shape, 1.0 - _offset(spec, path))
        parameter.data = values.to(getattr(torch, spec.dtype))
    return DecoderStack(decoder.requires_grad_(False).eval(), name=name)


def _offset(spec: StackSpec, path: str) -> float:
    norm = spec.rows[int(path.split(".")[1])].norm if path.startswith("layers.") else spec.final_norm
    return norm.offset
