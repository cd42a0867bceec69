"""A new decoder with initial weights, for training from scratch or for trying things on."""

from __future__ import annotations

import torch

from layerwise.nets.decoder import Decoder
from layerwise.nets.initial import initial
from layerwise.spec import StackSpec
from layerwise.stack.decoder import DecoderStack


def fresh(spec: StackSpec, seed: int = 0, name: str = "fresh") -> DecoderStack:
    """A decoder of Gaussian weights with standard deviation 1 / sqrt(inputs); norms one, biases zero."""
    with torch.device("meta"):
        decoder = Decoder(spec)
    generator = torch.Generator().manual_seed(seed)
    dtype = getattr(torch, spec.dtype)
    tensors = {path: initial(path, weight, _offset(spec, path), generator).to(dtype)
               for path, weight in decoder.named_parameters()}
    decoder.load_state_dict(tensors, assign=True)
    return DecoderStack(decoder.requires_grad_(False).eval(), name=name)


def _offset(spec: StackSpec, path: str) -> float:
    norm = spec.rows[int(path.split(".")[1])].norm if path.startswith("layers.") else spec.final_norm
    return norm.offset
