"""Dense products on processors with and without instructions for half precision."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from layerwise.nets import dense
from layerwise.nets.dense import Dense, linear

HALVES = [torch.bfloat16, torch.float16]
MANY = 8


@pytest.fixture(params=HALVES, ids=str)
def half(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """A dtype that is taken to be slow, with parts so small that every matrix has several."""
    monkeypatch.setattr(dense, "SLOW", dict.fromkeys(HALVES, MANY))
    monkeypatch.setattr(dense, "PART", 40)
    found: torch.dtype = request.param
    return found


def numbers(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape) + shape[0])).to(dtype)


@pytest.mark.parametrize("rows", [1, MANY - 1, MANY, 33])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("inference", [False, True])
def test_the_result_is_the_exact_one_rounded_once(half: torch.dtype, rows: int, biased: bool, inference: bool) -> None:
    x_NI, weight_OI = numbers(rows, 16, dtype=half), numbers(7, 16, dtype=half)
    bias_O = numbers(7, dtype=half) if biased else None
    with torch.inference_mode(inference):
        found = linear(x_NI, weight_OI, bias_O)
    exact = F.linear(x_NI.double(), weight_OI.double(), None if bias_O is None else bias_O.double())
    assert found.dtype == half and found.shape == (rows, 7)
    one_step = torch.finfo(half).eps * exact.abs().clamp(min=1)
    assert ((found.double() - exact).abs() <= one_step).all()


def test_many_rows_are_multiplied_in_float32(half: torch.dtype) -> None:
    x_BTI, weight_OI = numbers(2, MANY, 16, dtype=half), numbers(9, 16, dtype=half)
    assert torch.equal(linear(x_BTI, weight_OI), F.linear(x_BTI.float(), weight_OI.float()).to(half))


def test_autocast_decides_the_dtype(half: torch.dtype) -> None:
    x_NI, weight_OI = numbers(MANY, 16, dtype=torch.float32), numbers(9, 16, dtype=torch.float32)
    with torch.autocast("cpu", dtype=half):
        found = linear(x_NI, weight_OI)
    assert torch.equal(found, F.linear(x_NI, weight_OI).to(half))
    assert torch.equal(linear(x_NI, weight_OI), F.linear(x_NI, weight_OI))


def test_gradients_reach_everything(half: torch.dtype) -> None:
    layer = Dense(16, 9).to(half)
    x_NI = numbers(MANY, 16, dtype=half).requires_grad_()
    layer(x_NI).float().square().sum().backward()
    expected = Dense(16, 9)
    expected.load_state_dict(layer.state_dict())
    x32_NI = x_NI.detach().float().requires_grad_()
    F.linear(x32_NI, expected.weight, expected.bias).square().sum().backward()
    for ours, theirs in ((x_NI, x32_NI), (layer.weight, expected.weight), (layer.bias, expected.bias)):
        assert ours.grad is not None and theirs.grad is not None
        torch.testing.assert_close(ours.grad.float(), theirs.grad, rtol=0.02, atol=0.05)


@torch.inference_mode()
def test_what_watches_products_sees_them(half: torch.dtype) -> None:
    x_BNI, weight_OI = numbers(3, MANY, 16, dtype=half), numbers(9, 16, dtype=half)
    with FlopCounterMode(display=False) as counter:
        plain = linear(x_BNI, weight_OI)
    assert counter.get_total_flops() == 2 * 3 * MANY * 16 * 9
    mapped = torch.func.vmap(lambda x_NI: linear(x_NI, weight_OI))(x_BNI)
    for found in (mapped, linear(x_BNI, weight_OI), linear(x_BNI, weight_OI.T.contiguous().T)):
        torch.testing.assert_close(found.float(), plain.float(), rtol=0.01, atol=0.01)


def test_full_precision_is_left_alone(half: torch.dtype) -> None:
    x_NI, weight_OI = numbers(MANY, 16, dtype=torch.float64), numbers(9, 16, dtype=torch.float64)
    assert torch.equal(linear(x_NI, weight_OI), F.linear(x_NI, weight_OI))
