"""Scales learn through the dequantised product, codes stay, and what is stored takes the bytes it took."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from layerwise.nets.packed import PackedLinear
from layerwise.spec import Format
from layerwise.train.scales import ScaledLinear, _Product, packed_again, trainable_scales
from layerwise.transform.rounding import round_to_nearest

FORMATS = ["4/16", "3/16=", "8/row=", "2/32", "5/row", "4/24", "3/16s6", "4/16=s4"]


def packed(label: str, inputs: int = 32, bias: bool = False) -> PackedLinear:
    generator = torch.Generator().manual_seed(1)
    w_OI, b_O = torch.randn(12, inputs, generator=generator), torch.randn(12, generator=generator)
    form = Format.parse(label)
    return PackedLinear.from_codes(*round_to_nearest(w_OI, form), form, b_O if bias else None)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("label", FORMATS)
def test_untrained_it_is_the_packed_layer(label: str, x: Tensor) -> None:
    layer = packed(label, bias=True)
    scaled = ScaledLinear(layer)
    torch.testing.assert_close(scaled(x), layer(x), rtol=1e-5, atol=1e-5)
    again = scaled.packed()
    for name, tensor in layer.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


@pytest.mark.parametrize("label", FORMATS)
def test_trained_it_stores_the_same_codes_and_bytes_and_computes_the_same(label: str, x: Tensor) -> None:
    layer = packed(label)
    scaled = ScaledLinear(layer)
    with torch.no_grad():
        for parameter in scaled.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
    again = scaled.packed()
    torch.testing.assert_close(again(x), scaled(x), rtol=1e-5, atol=1e-5)
    assert not torch.equal(again.scale, layer.scale)
    assert torch.equal(again.state_dict()["codes"], layer.state_dict()["codes"])
    sizes = [sum(tensor.nbytes for tensor in one.state_dict().values()) for one in (layer, again)]
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("symmetric", [True, False])
def test_gradients_are_those_of_the_product(symmetric: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-8, 8, (3, 8), dtype=torch.int8, generator=generator)
    x, scale, zero = (torch.randn(shape, dtype=torch.float64, generator=generator, requires_grad=True)
                      for shape in ((2, 7), (3, 2), (3, 2)))
    inputs = (x, codes, scale, None if symmetric else zero)
    assert torch.autograd.gradcheck(_Product.apply, inputs)


@pytest.mark.parametrize("label", ["4/16", "4/16s6"])
def test_rounding_as_stored_passes_the_gradient_on(label: str) -> None:
    scaled = ScaledLinear(packed(label))
    values = (scaled.scale * 1.01).requires_grad_()
    scaled._as_stored(values, scaled.scale_row, signed=False).sum().backward()
    assert values.grad is not None and torch.equal(values.grad, torch.ones_like(values))


def test_layers_are_exchanged_in_place_and_back(x: Tensor) -> None:
    model = nn.Sequential(packed("4/16"), nn.ReLU(), nn.Linear(12, 3))
    before = model(x)
    assert trainable_scales(model) == ["0"]
    assert {name for name, _ in model.named_parameters()} == {"0.gain", "0.shift", "2.weight", "2.bias"}
    packed_again(model)
    assert isinstance(model[0], PackedLinear)
    torch.testing.assert_close(model(x), before)
