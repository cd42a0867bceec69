"""Smaller copies of a network: what they keep, what they lose, and that the original stays."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from layerwise.errors import BadOption
from layerwise.nets.classifiers import mlp
from layerwise.train.classify import seeded
from layerwise.train.compress import distilling, int8, low_rank, pruned


@pytest.fixture
def model() -> nn.Module:
    return seeded(lambda: mlp((32, 48, 10)), 0).eval()


X = torch.randn(6, 32, generator=torch.Generator().manual_seed(1))


def linears(model: nn.Module) -> list[nn.Linear]:
    return [module for module in model.modules() if isinstance(module, nn.Linear)]


def test_the_smallest_weights_are_zero_and_stay_so(model: nn.Module) -> None:
    before = model(X)
    slim, mask = pruned(model, 0.75)
    for old, new in zip(linears(model), linears(slim), strict=True):
        gone = new.weight == 0
        assert int(gone.sum()) == int(0.75 * new.weight.numel())
        assert old.weight.abs()[gone].max() <= old.weight.abs()[~gone].min()
        new.weight.data += 1
    mask(1)
    assert all(int((new.weight == 0).sum()) == int(0.75 * new.weight.numel()) for new in linears(slim))
    assert torch.equal(model(X), before)


def test_low_rank_is_the_best_of_its_size(model: nn.Module) -> None:
    slim, first = low_rank(model, 0.5), linears(model)[0]
    down, up = linears(slim)[:2]
    rank = int(0.5 * 48 * 32 / 80)
    assert down.weight.shape == (rank, 32)
    error = torch.linalg.matrix_norm(first.weight - up.weight @ down.weight).detach()
    assert float(error) == pytest.approx(float(torch.linalg.svdvals(first.weight.detach())[rank:].norm()), rel=1e-4)
    assert torch.equal(up.bias, first.bias)
    parameters = sum(p.numel() for p in slim.parameters())
    assert parameters < 0.55 * sum(p.numel() for p in model.parameters())


def test_eight_bits_stay_near(model: nn.Module) -> None:
    assert torch.allclose(int8(model)(X), model(X), atol=0.03)
    assert not linears(int8(model))


def test_a_student_that_is_its_teacher_loses_only_the_labels(model: nn.Module) -> None:
    labels = torch.arange(6)
    with torch.no_grad():
        loss = distilling(model)(model, X, labels)
        assert float(loss) == pytest.approx(float(F.cross_entropy(model(X), labels)) / 2, rel=1e-5)


def test_impossible_shares_are_refused(model: nn.Module) -> None:
    with pytest.raises(BadOption, match="share=1"):
        pruned(model, 1.0)
    with pytest.raises(BadOption, match="share=0"):
        low_rank(model, 0.0)
