"""Perturbations change what they say, and nothing is left of them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from layerwise.errors import BadOption
from layerwise.stack.perturb import Perturbation, noise, parts, perturbed, reset, shuffled, truncated, zero


def net(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5))


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def test_parts_are_the_weighted_modules() -> None:
    assert list(parts(net(0))) == ["0", "4"]
    assert list(parts(net(0), (nn.BatchNorm2d,))) == ["1"]


@pytest.mark.parametrize(
    "perturbation", [reset(net(1).state_dict()), zero, noise(0.5, 0), shuffled(0), truncated(0.3)], ids=range(5)
)
def test_everything_comes_back_bit_for_bit(perturbation: Perturbation) -> None:
    model = net(0)
    before, kept = state(model), dict(model.named_parameters())
    with pytest.raises(ZeroDivisionError), perturbed(model[4], "4", perturbation):
        assert not torch.equal(model[4].weight, before["4.weight"])
        assert torch.equal(model[0].weight, before["0.weight"])
        assert isinstance(model[4].weight, nn.Parameter)
        _ = 1 / 0
    after = state(model)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(kept[name] is weight for name, weight in model.named_parameters())


def test_reset_takes_buffers_too() -> None:
    model, other = net(0), net(1)
    other[1].running_mean.fill_(7)
    with perturbed(model[1], "1", reset(other.state_dict())):
        assert float(model[1].running_mean[0]) == 7
    assert float(model[1].running_mean[0]) == 0


def test_reset_to_its_own_state_changes_nothing() -> None:
    model = net(0).eval()
    x = torch.randn(2, 1, 4, 4)
    y = model(x)
    with perturbed(model[0], "0", reset(copy.deepcopy(model).state_dict())):
        assert torch.equal(model(x), y)


def test_noise_has_its_size_and_its_seed() -> None:
    layer = nn.Linear(300, 300, bias=False)
    a, b, c = (noise(0.1, seed)("a", layer)["weight"] for seed in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert float((a - layer.weight.detach()).norm() / layer.weight.detach().norm()) == pytest.approx(0.1, rel=0.02)
    assert not torch.equal(a, noise(0.1, 0)("b", layer)["weight"])


def test_truncation_is_the_best_of_its_rank() -> None:
    layer = nn.Conv2d(4, 8, 3)
    cut = truncated(0.5)("", layer)["weight"].flatten(1)
    singular = torch.linalg.svdvals(layer.weight.detach().flatten(1))
    assert int(torch.linalg.matrix_rank(cut, rtol=1e-4)) == 4
    lost = (cut - layer.weight.detach().flatten(1)).norm()
    assert float(lost) == pytest.approx(float(singular[4:].norm()), rel=1e-4)


def test_shuffling_keeps_the_values() -> None:
    layer = nn.Linear(6, 7)
    mixed = shuffled(0)("", layer)["weight"]
    assert torch.equal(mixed.flatten().sort().values, layer.weight.flatten().sort().values)


def test_another_build_is_refused() -> None:
    with pytest.raises(BadOption, match=r"4\.weight"), perturbed(net(0)[4], "4", _wrong):
        pass


def _wrong(*_: object) -> dict[str, Tensor]:
    return {"weight": torch.zeros(2)}
