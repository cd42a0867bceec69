"""A space of small convolutional networks: stages that differ in depth, width, kernel and kind of block.

Shapes: B pictures, C channels, H x W pixels, K classes.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

Kind = Literal["plain", "residual", "depthwise", "expanded"]
KINDS: tuple[Kind, ...] = ("plain", "residual", "depthwise")
"""What is drawn; "expanded" is there to compare with."""


@dataclass(frozen=True)
class Stage:
    """`depth` blocks of `width` channels; the first halves the resolution."""

    kind: Kind
    depth: int
    width: int
    kernel: int = 3


@dataclass(frozen=True)
class CnnPlan:
    """A stem of `stem` channels, the stages, and a linear classifier on the mean over pixels."""

    resolution: int
    stages: tuple[Stage, ...]
    stem: int = 16
    classes: int = 10

    def build(self) -> nn.Sequential:
        """The network, in evaluation mode; its members are stem, blocks and classifier."""
        layers: list[nn.Module] = [_conv(3, self.stem, 3, 2)]
        inputs = self.stem
        for stage in self.stages:
            for place in range(stage.depth):
                layers.append(Block(stage.kind, inputs, stage.width, stage.kernel, 1 if place else 2))
                inputs = stage.width
        layers.append(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, self.classes)))
        return nn.Sequential(*layers).eval()


class Block(nn.Module):
    """plain: one convolution; residual: two, with a shortcut; depthwise: expand by 4, convolve each channel, shrink.

    expanded is depthwise with a full convolution in the middle.
    """

    def __init__(self, kind: Kind, inputs: int, outputs: int, kernel: int, stride: int) -> None:
        super().__init__()
        if kind == "plain":
            self.body: nn.Module = _conv(inputs, outputs, kernel, stride)
        elif kind == "residual":
            self.body = nn.Sequential(_conv(inputs, outputs, kernel, stride), _conv(outputs, outputs, kernel, 1))
        else:
            wide = 4 * inputs
            groups = wide if kind == "depthwise" else 1
            self.body = nn.Sequential(_conv(inputs, wide, 1, 1), _conv(wide, wide, kernel, stride, groups),
                                      _conv(wide, outputs, 1, 1))
        self.shortcut = kind != "plain" and stride == 1 and inputs == outputs

    def forward(self, x_BCHW: Tensor) -> Tensor:
        y_BCHW: Tensor = self.body(x_BCHW)
        return x_BCHW + y_BCHW if self.shortcut else y_BCHW


def _conv(inputs: int, outputs: int, kernel: int, stride: int, groups: int = 1) -> nn.Sequential:
    """Batch norm folded away, as at inference."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups), nn.ReLU(True))


def sampled(count: int, seed: int) -> list[CnnPlan]:
    """Plans drawn from the whole space."""
    draw = random.Random(seed)
    return [
        CnnPlan(draw.choice((32, 48, 64)), tuple(
            Stage(draw.choice(KINDS), draw.randint(1, 3), width * draw.choice((8, 12, 16, 24)), draw.choice((3, 5)))
            for width in (1, 2, 4)))
        for _ in range(count)
    ]
