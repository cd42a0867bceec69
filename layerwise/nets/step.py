"""A block whose matrices are all packed, for few tokens in one compiled call.

Shapes: N tokens, C hidden width.
"""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int64, c_void_p

import torch
from torch import Tensor, nn

from layerwise.nets.attend import Pages
from layerwise.nets.attention import Attention
from layerwise.nets.compiled import DTYPES, library
from layerwise.nets.decoder import Block
from layerwise.nets.direct import FEW_TOKENS, LaidOutLinear, NativeRMSNorm
from layerwise.nets.feed_forward import FeedForward
from layerwise.nets.native import NativeMatrix
from layerwise.spec import Attention as AttentionSpec


class _Block(ctypes.Structure):
    _fields_ = [(name, c_void_p) for name in ("qkv", "o", "gate_up", "down", "qkv_bias", "o_bias", "attention_norm",
                                              "feed_forward_norm")] + [
        (name, c_int64) for name in ("hidden", "inner")] + [
        (name, c_float) for name in ("attention_eps", "feed_forward_eps")]


class Step:
    """What the block computes for at most `FEW_TOKENS` tokens whose keys lie in `Pages`."""

    def __init__(self, attention: AttentionSpec, layers: list[LaidOutLinear], norms: list[NativeRMSNorm]) -> None:
        self.attention, self._kept = attention, (layers, norms)
        matrices = [layer.tiled for layer in layers]
        hidden, inner = layers[0].in_features, layers[3].in_features
        biases = [None if layer.bias_O is None else layer.bias_O.data_ptr() for layer in layers[:2]]
        self._struct = _Block(*(matrix.address for matrix in matrices if isinstance(matrix, NativeMatrix)), *biases,
                              *(norm.weight.data_ptr() for norm in norms), hidden, inner, *(norm.eps for norm in norms))
        self._address, self.most = ctypes.addressof(self._struct), FEW_TOKENS * hidden

    @staticmethod
    def of(block: Block) -> Step | None:
        """The step of a prepared block; None where it has parts that the compiled function does not know."""
        attention, feed_forward = block.attention, block.feed_forward
        if attention is None or feed_forward is None or attention.post_norm or feed_forward.post_norm:
            return None
        mixer, body = attention.body, feed_forward.body
        if not isinstance(mixer, Attention) or not isinstance(body, FeedForward) or body.spec.activation != "silu":
            return None
        parts: list[nn.Module | None] = [mixer._modules.get("qkv"), mixer._modules.get("o"),
                                         body._modules.get("gate_up"), body._modules.get("down")]
        layers = [part for part in parts if isinstance(part, LaidOutLinear) and _whole(part)]
        norms = [norm for norm in (attention.norm, feed_forward.norm) if isinstance(norm, NativeRMSNorm)]
        if len(layers) < 4 or len(norms) < 2 or any(layer.bias_O is not None for layer in layers[2:]):
            return None
        return Step(mixer.spec, layers, norms)

    def __call__(self, x_NC: Tensor, pages: Pages) -> Tensor:
        """The block's output, [N, C]."""
        found = library()
        assert found is not None
        x_NC = x_NC.contiguous()
        y_NC = torch.empty_like(x_NC)
        if found.block_step(self._address, pages.shape, pages.places, len(x_NC), x_NC.data_ptr(), pages.cos, pages.sin,
                            pages.k, pages.v, y_NC.data_ptr(), DTYPES[x_NC.dtype], torch.get_num_threads()):
            raise MemoryError(f"no memory for a block with {len(x_NC)} tokens")
        return y_NC


def _whole(layer: LaidOutLinear) -> bool:
    """Whether the compiled product reads the layer's inputs as they are, without padding."""
    return isinstance(layer.tiled, NativeMatrix) and layer.tiled.inputs == layer.in_features
