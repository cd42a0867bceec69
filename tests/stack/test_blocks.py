"""Which modules are taken for layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import layerwise as lw
from layerwise.errors import BadModel, BadOption
from layerwise.stack.blocks import find


class Layer(nn.Module):
    """A transformer-like layer that holds a list of experts itself."""

    def __init__(self, width: int = 4, experts: int = 8) -> None:
        super().__init__()
        self.proj = nn.Linear(width, width)
        expert = [nn.Sequential(nn.Linear(width, width), nn.ReLU()) for _ in range(experts)]
        self.experts = nn.ModuleList(expert)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.proj(x)


class OtherLayer(Layer):
    """A second kind of layer."""


class Wrapped(nn.Module):
    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)


def paths(module: nn.Module, **kwargs: Any) -> list[str]:
    return list(find(module, **kwargs))


# lists ------------------------------------------------------------------------------------------


def test_layers_and_not_what_they_hold() -> None:
    layers = nn.ModuleList(Layer() for _ in range(3))
    module = Wrapped(embed=nn.Embedding(9, 4), layers=layers, head=nn.Linear(4, 9))
    assert paths(module) == ["layers.0", "layers.1", "layers.2"]


def test_a_list_may_mix_kinds_of_layers() -> None:
    module = Wrapped(layers=nn.ModuleList([Layer(), OtherLayer(experts=1), Layer(), OtherLayer(experts=2)]))
    assert paths(module) == [f"layers.{i}" for i in range(4)]


def test_encoder_and_decoder_are_chained() -> None:
    encoder, decoder = (nn.ModuleList(kind() for _ in range(2)) for kind in (Layer, OtherLayer))
    module = Wrapped(encoder=Wrapped(layers=encoder), decoder=Wrapped(layers=decoder))
    assert paths(module) == ["encoder.layers.0", "encoder.layers.1", "decoder.layers.0", "decoder.layers.1"]


def test_stages_of_different_width_are_looked_into() -> None:
    stages = nn.ModuleList(Wrapped(blocks=nn.ModuleList(Layer(width) for _ in range(n)))
                           for width, n in ((4, 2), (8, 1), (16, 3)))
    assert paths(Wrapped(stages=stages)) == [
        "stages.0.blocks.0", "stages.0.blocks.1", "stages.1.blocks.0",
        "stages.2.blocks.0", "stages.2.blocks.1", "stages.2.blocks.2"]


def test_a_sequence_may_begin_and_end_with_other_things() -> None:
    stem = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    assert paths(nn.Sequential(stem, Layer(), Layer(), nn.Linear(4, 2))) == ["1", "2"]


def test_lists_of_lists_are_chained() -> None:
    pairs = nn.ModuleList(nn.ModuleList([Layer(), OtherLayer()]) for _ in range(2))
    assert paths(Wrapped(layers=pairs)) == ["layers.0.0", "layers.0.1", "layers.1.0", "layers.1.1"]


def test_plain_layers_in_a_sequence() -> None:
    module = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 8), nn.LayerNorm(8),
                           nn.Linear(8, 2))
    assert paths(module) == ["0", "3", "5"]


def test_a_shared_layer_is_found_once() -> None:
    layer = Layer()
    assert paths(Wrapped(layers=nn.ModuleList([layer, Layer(), layer]))) == ["layers.0", "layers.1"]


# tracing ----------------------------------------------------------------------------------------


class Traced(nn.Module):
    """No list; registered in another order than called."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 2)
        self.second = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4, affine=False)
        self.first = nn.Linear(3, 4)

    def forward(self, x: Tensor, flag: bool = False) -> Tensor:
        x = self.norm(F.relu(self.first(x)))
        if flag:
            x = -x
        return self.head(x + self.second(x))


def test_children_in_the_order_of_their_calls() -> None:
    assert paths(Traced()) == ["first", "second", "head"]


def test_a_wrapper_is_looked_into() -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Traced()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x).softmax(-1)

    assert paths(Wrapper()) == ["net.first", "net.second", "net.head"]


class Untraceable(Traced):
    def forward(self, x: Tensor, flag: bool = False) -> Tensor:
        return super().forward(x) if x.sum() > 0 else x


class Looped(Traced):
    def forward(self, x: Tensor, flag: bool = False) -> Tensor:
        return self.head(self.second(self.second(self.first(x))))


@pytest.mark.parametrize("module", [nn.Linear(2, 2), nn.Sequential(Layer(experts=0)), nn.ReLU(), Untraceable(),
                                    Looped()])
def test_a_module_without_layers_says_what_to_do(module: nn.Module) -> None:
    with pytest.raises(BadModel, match=r"name the layers in call order, blocks=\["):
        lw.open(module)


# given by the user ------------------------------------------------------------------------------


def test_a_test_picks_the_outermost_matches(make: Callable[[str], Any]) -> None:
    module = make("stages").module
    assert paths(module, blocks=lambda m: isinstance(m, (nn.Sequential, nn.Conv2d))) == [
        "stem", "layer1", "layer2", "layer3"]
    with pytest.raises(BadModel, match="blocks finds none"):
        find(module, lambda m: False)


def test_paths_in_the_order_given(make: Callable[[str], Any]) -> None:
    network = make("stages")
    wanted = ["stem", "layer1", "layer2.0", "layer2.1", "layer3"]
    stack = lw.open(network.module, blocks=wanted)
    assert [row.mixer.path for row in stack.spec.rows] == wanted  # type: ignore[union-attr]
    assert torch.equal(stack.finish(stack.run(network.call(stack.start))), network.call(network.module))


@pytest.mark.parametrize(("wanted", "message"), [
    (["layer1", "layer9"], "did you mean 'layer"), (["layer1", "layer1"], "separate modules"),
    (["layer1", "layer1.0"], "separate modules"), ([""], "paths inside Stages")])
def test_impossible_paths_are_refused(make: Callable[[str], Any], wanted: list[str], message: str) -> None:
    with pytest.raises(BadOption, match=message):
        find(make("stages").module, wanted)
