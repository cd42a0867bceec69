"""The walk gives what starting over gives; the comparisons are those known by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import layerwise as lw
from layerwise.measure.perturbation import criticality, disagreement, outputs, perturb, total_variation
from layerwise.nets.classifiers import ResNet, mlp
from layerwise.stack.decoder import DecoderStack
from layerwise.stack.perturb import parts, perturbed, reset, zero
from layerwise.train.fresh import fresh


def loud(seed: int) -> ResNet:
    """Weights large enough that predictions differ."""
    torch.manual_seed(seed)
    net = ResNet(1, (4, 8), channels=1).eval()
    net.linear.weight.data *= 20
    return net


def test_every_part_equals_a_pass_of_its_own() -> None:
    net, other = loud(0), loud(1)
    x = [torch.randn(3, 1, 8, 8), torch.randn(2, 1, 8, 8)]
    found = perturb(lw.open(net), x, {"reset": reset(other.state_dict())}, {"criticality": criticality})
    assert list(found) == ["conv1", "layer1.0.conv1", "layer1.0.conv2", "layer2.0.conv1", "layer2.0.conv2", "linear"]
    original = net(torch.cat(x)).detach()
    for path, module in parts(net).items():
        with perturbed(module, path, reset(other.state_dict())), torch.no_grad():
            expected = criticality(original, net(torch.cat(x)))
        assert found[path]["reset"]["criticality"] == pytest.approx(expected, abs=1e-6) and expected > 1e-3


def test_batches_and_the_state_itself_do_not_matter() -> None:
    net = loud(0)
    x = torch.randn(6, 1, 8, 8)
    changes = {"zero": zero, "own": reset(net.state_dict())}
    one, many = (
        perturb(lw.open(net), data, changes, {"c": criticality, "d": disagreement}) for data in ([x], x.split(1))
    )
    for path in one:
        assert one[path]["own"] == {"c": pytest.approx(0, abs=1e-6), "d": 0}
        assert one[path]["zero"]["c"] == pytest.approx(many[path]["zero"]["c"], abs=1e-5)


def test_blocks_of_a_decoder_can_be_reset(tiny_stack: DecoderStack) -> None:
    tokens = torch.randint(0, 97, (2, 9))
    blocks = {f"layers.{layer}": tiny_stack.block(layer) for layer in range(4)}
    state = fresh(tiny_stack.spec, 5).decoder.state_dict()
    found = perturb(tiny_stack, [tokens], {"fresh": reset(state)}, {"c": criticality}, blocks)
    before = outputs(tiny_stack, [tokens])
    with perturbed(blocks["layers.2"], "layers.2", reset(state)):
        expected = criticality(before, outputs(tiny_stack, [tokens]))
    assert found["layers.2"]["fresh"]["c"] == pytest.approx(expected, abs=1e-6)
    assert torch.equal(outputs(tiny_stack, [tokens]), before)


def test_it_finds_the_layer_that_matters() -> None:
    net = mlp((4, 4, 4, 4))
    for module in net.modules():
        if isinstance(module, nn.Linear):
            nn.init.eye_(module.weight)
            nn.init.zeros_(module.bias)
    other = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    other["3.weight"] = torch.eye(4).roll(1, 0)
    found = perturb(lw.open(net), [torch.eye(4) * 20], {"x": reset(other)}, {"d": disagreement})
    assert [value["x"]["d"] for value in found.values()] == [0, 1, 0]


def test_comparisons_by_hand() -> None:
    sure = torch.tensor([[50.0, 0.0], [0.0, 50.0]])
    assert criticality(sure, sure) == pytest.approx(0, abs=1e-6)
    assert criticality(sure, sure.flip(1)) == pytest.approx(1) == total_variation(sure, sure.flip(1))
    assert disagreement(sure, sure.flip(1)) == 1 and disagreement(sure, torch.tensor([[1.0, 0], [1, 0]])) == 0.5
