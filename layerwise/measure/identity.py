"""Which model this is: a short hash of its table and of a sample of every stored tensor."""

from __future__ import annotations

import hashlib
import json

import torch
from torch import Tensor

from layerwise.stack.base import Stack
from layerwise.stack.decoder import DecoderStack

SAMPLE = 64
"""Values read of every tensor, evenly spaced: training or rounding a tensor changes some of them."""


@torch.no_grad()
def identity(stack: Stack) -> str:
    """Equal for equal tables and weights, wherever they are stored. Reads every layer once."""
    digest = hashlib.sha256(json.dumps(stack.spec.to_json(), sort_keys=True).encode())
    if isinstance(stack, DecoderStack):
        for name, tensor in stack.tensors():
            _add(digest, name, tensor)
    else:
        for layer in range(len(stack)):
            for name, tensor in stack.block(layer).state_dict().items():
                _add(digest, f"{layer}.{name}", tensor)
    return digest.hexdigest()[:16]


def _add(digest: hashlib._Hash, name: str, tensor: Tensor) -> None:
    values = tensor.detach().flatten()
    digest.update(name.encode())
    digest.update(values[:: max(1, values.numel() // SAMPLE)].double().cpu().numpy().tobytes())
