"""Keys and values as integers of 8 or 4 bits with scales, head by head, as a cache may hold them.

Shapes: D head width, G groups of a head, g numbers of a group.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from layerwise.spec.formats import Precision, group_of


class KeyCode(ABC):
    """How vectors become parts, each a tensor, and vectors again."""

    @abstractmethod
    def layout(self, width: int) -> list[tuple[int, torch.dtype]]:
        """Width and dtype of each part that a head of `width` numbers becomes."""

    @abstractmethod
    def encode(self, x: Tensor) -> list[Tensor]:
        """The parts of float32 vectors [..., D]."""

    @abstractmethod
    def decode(self, parts: list[Tensor]) -> Tensor:
        """Vectors [..., D] from their parts, in float32."""


class Int8(KeyCode):
    """8-bit integers, rounded to nearest, with a float32 scale for each head of a token."""

    def layout(self, width: int) -> list[tuple[int, torch.dtype]]:
        return [(width, torch.int8), (1, torch.float32)]

    def encode(self, x: Tensor) -> list[Tensor]:
        scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 127
        return [(x / scale).round().to(torch.int8), scale]

    def decode(self, parts: list[Tensor]) -> Tensor:
        codes, scale = parts
        return codes * scale


class Int4(KeyCode):
    """4-bit codes between the least and the largest of `group_of(width)` neighbours, two to a byte.

    x = low + code * step; low and step are bfloat16, and codes are rounded by what these can say.
    """

    def layout(self, width: int) -> list[tuple[int, torch.dtype]]:
        groups = width // group_of(width)
        return [(width // 2, torch.uint8), (groups, torch.bfloat16), (groups, torch.bfloat16)]

    def encode(self, x: Tensor) -> list[Tensor]:
        x_Gg = x.unflatten(-1, (-1, group_of(x.shape[-1])))
        low_G = x_Gg.amin(-1).to(torch.bfloat16)
        step_G = ((x_Gg.amax(-1) - low_G) / 15).clamp(min=1e-12).to(torch.bfloat16)
        codes = ((x_Gg - low_G[..., None]) / step_G[..., None]).round().clamp(0, 15).to(torch.uint8).flatten(-2)
        first, second = codes.chunk(2, -1)
        return [first | second << 4, low_G, step_G]

    def decode(self, parts: list[Tensor]) -> Tensor:
        packed, low_G, step_G = parts
        codes_Gg = torch.cat([packed & 15, packed >> 4], -1).unflatten(-1, (low_G.shape[-1], -1))
        return torch.addcmul(low_G.float()[..., None], codes_Gg.float(), step_G.float()[..., None]).flatten(-2)


KEY_CODES: dict[Precision, KeyCode] = {"int8": Int8(), "int4": Int4()}


def as_kept(x: Tensor, precision: Precision) -> Tensor:
    """Keys or values [..., D] as a cache of that precision gives them back."""
    if precision == "model":
        return x
    code = KEY_CODES[precision]
    return code.decode(code.encode(x.float())).to(x.dtype)
