"""Every tensor of a decoder as it would be without packing and factors, one layer in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from layerwise.nets.decoder import MATRICES, Block
from layerwise.nets.factored import FactoredLinear
from layerwise.nets.packed import PackedMatrix
from layerwise.nets.tiered import PackedTable, TieredEmbedding
from layerwise.stack.decoder import DecoderStack


def dense_tensors(stack: DecoderStack) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) as in the dense decoder: packed matrices and products of factors in float32."""
    for name, module in stack.decoder.named_children():
        if name != "layers":
            yield from _module(name, module)
    for layer in range(len(stack)):
        block = stack.block(layer)
        assert isinstance(block, Block)
        matrices = block.matrices()
        inside = tuple(f"{MATRICES[name]}.body.{name}." for name in matrices)
        whole = {id(module) for module in matrices.values()}
        for path, part in block.named_modules():
            if id(part) in whole or not (path.startswith(inside) or list(part.children())):
                yield from _module(f"layers.{layer}.{path}", part)
            elif not path.startswith(inside):  # what a half holds beside its matrices
                for name, own in part.named_parameters(recurse=False):
                    yield f"layers.{layer}.{path}.{name}", own


def _module(path: str, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The tensors of one module, its matrix as numbers."""
    if isinstance(module, PackedMatrix | FactoredLinear | TieredEmbedding):
        yield f"{path}.weight", module.dense()
        bias = None if isinstance(module, PackedTable) else module.bias
        if isinstance(bias, Tensor):
            yield f"{path}.bias", bias
    else:
        for name, tensor in module.named_parameters():
            yield f"{path}.{name}", tensor
