"""Small image classifiers: a residual network in the CIFAR layout, a plain convolutional one, and an MLP.

`ResNet` has the parameter names of the widely used CIFAR-10 ResNets (`conv1`, `bn1`, `layer1.0.conv1`, ...,
`linear`), whose shortcuts subsample and pad with empty channels (He et al. 2016, option A).

Shapes: B pictures, C channels, H x W pixels, K classes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn


class ResidualBlock(nn.Module):
    """relu(x + bn2(conv2(relu(bn1(conv1(x))))))."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.extra = stride, outputs - inputs

    def forward(self, x_BCHW: Tensor) -> Tensor:
        y_BCHW = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x_BCHW)))))
        x_BCHW = x_BCHW[:, :, :: self.stride, :: self.stride]
        if self.extra:
            x_BCHW = F.pad(x_BCHW, (0, 0, 0, 0, self.extra // 2, self.extra - self.extra // 2))
        return F.relu(x_BCHW + y_BCHW)


class ResNet(nn.Module):
    """Stages of `depth` residual blocks, each stage after the first at half the resolution: logits [B, K].

    ResNet-20 for CIFAR-10 is `ResNet(3, (16, 32, 64))`.
    """

    def __init__(self, depth: int, widths: Sequence[int], channels: int = 3, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, widths[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        inputs, self.stages = widths[0], len(widths)
        for stage, width in enumerate(widths):
            first = ResidualBlock(inputs, width, 2 if stage else 1)
            rest = [ResidualBlock(width, width, 1) for _ in range(depth - 1)]
            self.add_module(f"layer{stage + 1}", nn.Sequential(first, *rest))
            inputs = width
        self.linear = nn.Linear(inputs, classes)

    def features(self, x_BCHW: Tensor) -> Tensor:
        """What enters the classifier, [B, widths[-1]]."""
        h_BCHW: Tensor = F.relu(self.bn1(self.conv1(x_BCHW)))
        for stage in range(self.stages):
            h_BCHW = self.get_submodule(f"layer{stage + 1}")(h_BCHW)
        return h_BCHW.mean((2, 3))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        logits_BK: Tensor = self.linear(self.features(x_BCHW))
        return logits_BK


def convnet(widths: Sequence[int], hidden: int, side: int, *, channels: int = 1, classes: int = 10,
            kernel: int = 3) -> nn.Sequential:
    """Convolutions with ReLU, max-pools after the first two, one hidden linear layer, and the classifier."""
    layers: list[nn.Module] = []
    inputs = channels
    for place, width in enumerate(widths):
        layers += [nn.Conv2d(inputs, width, kernel, padding=kernel // 2), nn.ReLU()]
        if place < 2:
            layers.append(nn.MaxPool2d(2))
            side //= 2
        inputs = width
    layers += [nn.Flatten(), nn.Linear(inputs * side * side, hidden), nn.ReLU(), nn.Linear(hidden, classes)]
    return nn.Sequential(*layers)


def mlp(widths: Sequence[int], activation: Callable[[], nn.Module] = nn.ReLU, *, bias: bool = True,
        norm: bool = False) -> nn.Sequential:
    """Linear layers of the given widths, inputs first, with an activation between; inputs are flattened.

    `norm` puts a batch norm without learned scale before every activation.
    """
    layers: list[nn.Module] = [nn.Flatten()]
    for place, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
        layers.append(nn.Linear(inputs, outputs, bias=bias))
        if place < len(widths) - 2:
            layers += [nn.BatchNorm1d(outputs, affine=False), activation()] if norm else [activation()]
    return nn.Sequential(*layers)
