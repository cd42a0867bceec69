"""Which module computes which mixer of a row."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from layerwise import spec
from layerwise.nets.attention import Attention
from layerwise.nets.state_space import StateSpace

MIXERS: dict[type[spec.Mixer], Callable[..., nn.Module]] = {
    spec.Attention: Attention,
    spec.StateSpace: StateSpace,
}
"""Called with the row's mixer, the hidden width and the row's norm; the module with hidden states, flow and layer."""


def build_mixer(mixer: spec.Mixer, hidden: int, norm: spec.Norm) -> nn.Module:
    """The module for `mixer` in a stack of width `hidden`."""
    return MIXERS[type(mixer)](mixer, hidden, norm)
