"""An image encoder and a projector: pixels to vectors that a decoder reads like embedded words.

Shapes: B pictures, S pixels a side, P patches, F encoder width, C hidden width of the decoder.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class VisionSpec:
    """`widths` of the encoder's stages, each of which halves the side; `hidden` is the decoder's width."""

    side: int
    widths: tuple[int, ...]
    hidden: int

    @property
    def patches(self) -> int:
        return (self.side >> len(self.widths)) ** 2


class Stage(nn.Module):
    """Half the side: a convolution of stride two, then a residual 3 x 3 convolution."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.halve = nn.Conv2d(inputs, outputs, 3, 2, padding=1)
        self.mix = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.norm = nn.GroupNorm(1, outputs)

    def forward(self, x_BFSS: Tensor) -> Tensor:
        x_BFSS = nn.functional.gelu(self.halve(x_BFSS))
        mixed_BFSS: Tensor = self.norm(x_BFSS + nn.functional.gelu(self.mix(x_BFSS)))
        return mixed_BFSS


class Vision(nn.Module):
    """Encoder (a list of stages, then a vector for each place) and projector (two linear layers).

    Turns uint8 pictures into one vector for each patch.
    """

    def __init__(self, spec: VisionSpec) -> None:
        super().__init__()
        self.spec = spec
        widths = (3, *spec.widths)
        self.encoder = nn.Sequential(*(Stage(a, b) for a, b in itertools.pairwise(widths)))
        self.places = nn.Parameter(torch.randn(spec.patches, widths[-1]))
        self.projector = nn.Sequential(
            nn.Linear(widths[-1], 2 * spec.hidden), nn.GELU(), nn.Linear(2 * spec.hidden, spec.hidden)
        )

    def encode(self, pixels_B3SS: Tensor) -> Tensor:
        """What the encoder sees in every patch, [B, P, F], row by row from the upper left."""
        scaled_B3SS = pixels_B3SS.to(next(self.encoder.parameters()).dtype) / 127.5 - 1
        features_BPF: Tensor = self.encoder(scaled_B3SS).flatten(2).transpose(1, 2) + self.places
        return features_BPF

    def forward(self, pixels_B3SS: Tensor) -> Tensor:
        """Vectors for the decoder, [B, P, C]."""
        vectors_BPC: Tensor = self.projector(self.encode(pixels_B3SS))
        return vectors_BPC
