"""The weights of a block as numbers, whatever they are stored as."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from layerwise.nets.packed import PackedMatrix


def tensors(block: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every weight tensor by name, one at a time; packed matrices are unpacked to float32."""
    for name, parameter in block.named_parameters():
        yield name, parameter.detach()
    for name, module in block.named_modules():
        if isinstance(module, PackedMatrix):
            yield f"{name}.weight", module.dense()
