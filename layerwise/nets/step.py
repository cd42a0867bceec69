"""A block, its matrices packed or dense in half precision, in one compiled call: for few tokens, or for any number
where all products take many rows. Blocks one after the other are one call as well.

Shapes: N tokens, P of them wanted, C hidden width.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_float, c_int64, c_void_p
from typing import cast

import torch
from torch import Tensor, nn

from layerwise.nets.attend import Pages
from layerwise.nets.compiled import DTYPES, library
from layerwise.nets.decoder import Block
from layerwise.nets.direct import FEW_TOKENS, DirectAttention, LaidOutLinear, NativeRMSNorm
from layerwise.nets.feed_forward import FeedForward
from layerwise.nets.native import ACTIVATIONS, NativeMatrix
from layerwise.nets.wide import HalfLinear

Layer = LaidOutLinear | HalfLinear


class _Joined(ctypes.Structure):
    _fields_ = [("parts", c_void_p * 3), ("bias", c_void_p * 3)]


class _Block(ctypes.Structure):
    _fields_ = [("qkv", _Joined), ("gate_up", _Joined)] + [
        (name, c_void_p) for name in ("o", "down", "o_bias", "attention_norm", "feed_forward_norm", "attention_post",
                                      "feed_forward_post", "heads")] + [
        (name, c_int64) for name in ("hidden", "inner", "activation")] + [("eps", c_float)]


class Step:
    """What the block computes for tokens whose keys lie in `Pages`."""

    def __init__(self, attention: DirectAttention, feed_forward: FeedForward,
                 norms: list[NativeRMSNorm | None]) -> None:
        self.attention = attention.spec
        qkv, gate_up = _parts(attention, ("qkv", "q", "k", "v")), _parts(feed_forward, ("gate_up", "gate", "up"))
        (o,), (down,) = _parts(attention, ("o",)), _parts(feed_forward, ("down",))
        self._kept = qkv, gate_up, o, down, norms, attention.norms
        hidden, first = qkv[0].in_features, norms[0]
        assert first is not None
        self._struct = _Block(
            _joined(qkv), _joined(gate_up), _address(o), _address(down), _bias(o),
            *(None if norm is None else norm.weight.data_ptr() for norm in norms),
            None if attention.norms is None else attention.norms.address, hidden, down.in_features,
            ACTIVATIONS[feed_forward.spec.activation], first.eps)
        self.address, self._few = ctypes.addressof(self._struct), FEW_TOKENS * hidden
        self._many = frozenset.intersection(*(layer.many for layer in (*qkv, *gate_up, o, down)))

    def takes(self, x: Tensor) -> bool:
        """Whether these hidden states are best taken through the block in one call."""
        return x.numel() <= self._few or x.dtype in self._many

    @staticmethod
    def of(block: Block) -> Step | None:
        """The step of a prepared block; None where it has parts that the compiled function does not know."""
        if block.attention is None or block.feed_forward is None:
            return None
        mixer, body = block.attention.body, block.feed_forward.body
        if not isinstance(mixer, DirectAttention) or not isinstance(body, FeedForward):
            return None
        norms = [block.attention.norm, block.feed_forward.norm, block.attention.post_norm, block.feed_forward.post_norm]
        known = [norm for norm in norms if norm is None or isinstance(norm, NativeRMSNorm)]
        if (not mixer.known or not body.spec.gated or body.spec.bias or body.spec.activation not in ACTIVATIONS
                or len(known) < len(norms) or not all(map(_whole, _matrices(mixer) + _matrices(body)))):
            return None
        return Step(mixer, body, known)


class _Pass(ctypes.Structure):
    _fields_ = [(name, c_void_p) for name in ("block", "shape", "places", "cos", "sin", "k", "v")] + [
        ("kept", c_int64)]


def through(steps: Sequence[tuple[Step, Pages]], x_NC: Tensor, wanted_P: Tensor | None = None) -> Tensor:
    """What blocks one after the other make of hidden states, [N, C], in one call.

    Of tokens that are not among `wanted_P`, int64 in ascending order, the last block makes keys and values only: what
    comes back is what they were before it.
    """
    found = library()
    assert found is not None
    x_NC = x_NC.contiguous()
    y_NC = torch.empty_like(x_NC)
    passes = (_Pass * len(steps))(*[
        _Pass(step.address, pages.shape, pages.places, pages.cos, pages.sin, pages.k, pages.v, pages.kept)
        for step, pages in steps])
    wanted = (None, -1) if wanted_P is None else (wanted_P.data_ptr(), len(wanted_P))
    if found.block_steps(passes, len(steps), len(x_NC), *wanted, x_NC.data_ptr(), y_NC.data_ptr(), DTYPES[x_NC.dtype],
                         torch.get_num_threads()):
        raise MemoryError(f"no memory for a block with {len(x_NC)} tokens")
    return y_NC


def _parts(body: nn.Module, names: Sequence[str]) -> list[Layer]:
    """The layers of those names that are there."""
    return [cast(Layer, body._modules[name]) for name in names if name in body._modules]


def _matrices(body: nn.Module) -> list[nn.Module]:
    """All that multiplies in half a block."""
    return [part for part in body.children() if not isinstance(part, NativeRMSNorm)]


def _whole(layer: nn.Module) -> bool:
    """Whether the compiled product knows the layer and reads its inputs as they are, without padding."""
    return isinstance(layer, HalfLinear) or (isinstance(layer, LaidOutLinear) and isinstance(layer.tiled, NativeMatrix)
                                             and layer.tiled.inputs == layer.in_features)


def _joined(layers: Sequence[Layer]) -> _Joined:
    rest = [None] * (3 - len(layers))
    return _Joined((c_void_p * 3)(*map(_address, layers), *rest), (c_void_p * 3)(*map(_bias, layers), *rest))


def _address(layer: Layer) -> int:
    return layer.address if isinstance(layer, HalfLinear) else cast(NativeMatrix, layer.tiled).address


def _bias(layer: Layer) -> int | None:
    return None if layer.bias_O is None else layer.bias_O.data_ptr()
