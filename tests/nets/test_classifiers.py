"""The layouts are those that pretrained files have; sizes are counted by hand."""

from __future__ import annotations

import torch
from torch import nn

import layerwise as lw
from layerwise.nets.classifiers import ResNet, convnet, mlp


def count(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def test_resnet_20_has_its_published_size_and_names() -> None:
    net = ResNet(3, (16, 32, 64))
    assert count(net) == 269_722
    assert {"conv1.weight", "bn1.running_mean", "layer3.2.conv2.weight", "linear.bias"} <= set(net.state_dict())
    assert net(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_the_logits_are_linear_in_the_features() -> None:
    net = ResNet(1, (4, 8), channels=1).eval()
    x = torch.randn(3, 1, 12, 12)
    assert torch.equal(net(x), net.linear(net.features(x)))


def test_a_resnet_opens_to_its_blocks() -> None:
    stack = lw.open(ResNet(2, (4, 8), channels=1).eval())
    assert len(stack) == 4
    x = torch.randn(2, 1, 12, 12)
    assert torch.equal(stack.finish(stack.run(stack.start(x))), stack(x))


def test_shortcuts_subsample_and_pad() -> None:
    block = ResNet(1, (2, 6)).get_submodule("layer2")[0].eval()  # type: ignore[index]
    nn.init.zeros_(block.bn2.weight)
    x = torch.rand(1, 2, 4, 4)
    y = block(x)
    assert torch.equal(y[:, 2:4], x[:, :, ::2, ::2]) and not y[:, :2].any() and not y[:, 4:].any()


def test_plain_networks() -> None:
    assert convnet((4, 8, 8), 16, side=12)(torch.zeros(2, 1, 12, 12)).shape == (2, 10)
    net = mlp((6, 5, 4, 1))
    assert count(net) == 6 * 5 + 5 + 5 * 4 + 4 + 4 + 1 and net(torch.zeros(2, 2, 3)).shape == (2, 1)
    assert not any(p.dim() == 1 for p in mlp((6, 5, 4), bias=False, norm=True).parameters())
