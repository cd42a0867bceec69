"""Utilization of networks whose use is known, and that measuring leaves them as they were."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from layerwise.measure.utilized import Utilization, cut
from layerwise.stack.perturb import parts


def narrow() -> tuple[nn.Sequential, torch.Tensor]:
    """Two layers of width 8 whose inputs vary in 2 directions."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    return net, torch.randn(200, 2) @ torch.randn(2, 8)


def test_two_directions_use_two_and_the_mean() -> None:
    net, x = narrow()
    found = Utilization.of(parts(net), lambda: net(x))
    assert found.share(1e-6) == pytest.approx(3 / 8)
    weights = found.projected(found.used(1e-6))
    assert found.error(weights) < 1e-3
    assert found.with_weights(weights, lambda: float((net(x) - net[1](net[0](x))).detach().abs().max())) == 0


def test_measuring_with_other_weights_leaves_them() -> None:
    net, x = narrow()
    found = Utilization.of(parts(net), lambda: net(x))
    y = net(x)
    zero = {path: torch.zeros(8, 8) for path in found.weights}
    bias = net[1].bias.detach()
    assert found.with_weights(zero, lambda: float((net(x) - bias).detach().abs().max())) == pytest.approx(0, abs=1e-6)
    assert torch.equal(net(x), y)


def test_full_cuts_are_the_weight() -> None:
    net, x = narrow()
    found = Utilization.of(parts(net), lambda: net(x + torch.randn(200, 8)))
    for path, weight in found.weights.items():
        assert torch.allclose(cut(found.plain[path], 8), weight, atol=1e-5)
        assert torch.allclose(cut(found.best[path], 8), weight, atol=1e-4)
    assert found.ranks(0.5) == {"0": 4, "1": 4}


def test_parameters_are_counted_where_two_factors_pay() -> None:
    net, x = narrow()
    found = Utilization.of(parts(net), lambda: net(x))
    assert found.parameters({"0": 2, "1": 7}) == (2 * 16 + 64) / 128
    assert found.pays("0", 3) and not found.pays("0", 4)
