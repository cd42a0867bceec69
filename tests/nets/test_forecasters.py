"""Every family answers in the same shape and shows its depth in the same tokens; causal ones do not look ahead."""

from __future__ import annotations

import pytest
import torch

from layerwise.nets.forecasters import Causal, Family, Forecaster, Mixer, Recurrent


@pytest.mark.parametrize("family", ["transformer", "gru", "tcn", "mixer"])
def test_shapes_are_those_of_every_family(family: Family) -> None:
    model, past = Forecaster(family, 3, width=8, context=16, horizon=5), torch.randn(2, 16)
    assert model(past).shape == (2, 5)
    states = model.states(past)
    assert [tuple(state.shape) for state in states] == [(2, 4, 8)] * 3
    assert torch.allclose(model.read(states[-1].flatten(1)), model(past), atol=1e-6)


@pytest.mark.parametrize("layer", [Causal(8, 2), Recurrent(8)])
def test_a_later_token_does_not_change_an_earlier_one(layer: torch.nn.Module) -> None:
    x = torch.randn(1, 6, 8)
    changed = x.clone()
    changed[:, 4:] += 1
    assert torch.allclose(layer(x)[:, :4], layer(changed)[:, :4], atol=1e-6)
    assert not torch.allclose(layer(x)[:, 4:], layer(changed)[:, 4:])


def test_a_mixer_looks_everywhere() -> None:
    layer, x = Mixer(8, 6), torch.randn(1, 6, 8)
    changed = x.clone()
    changed[:, 5] += torch.arange(8.0)
    assert not torch.allclose(layer(x)[:, :4], layer(changed)[:, :4])
