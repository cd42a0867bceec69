"""Moments by class on states known by hand, a float64 loop, and parts that add up."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from layerwise.errors import BadData, BadModel
from layerwise.measure.class_moments import ClassMoments, class_moments
from layerwise.stack.module import ModuleStack

Data = list[tuple[Tensor, Tensor]]


class Shift(nn.Module):
    """x + a value, which may be nan."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Tensor) -> Tensor:
        return x + self.value


def shifts(*values: float) -> ModuleStack:
    return ModuleStack(nn.Sequential(*map(Shift, values)), [str(place) for place in range(len(values))])


def data() -> Data:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(6, 4, 3, generator=generator), torch.tensor([0, 2, 1, 2, 0, 2])) for _ in range(3)]


def test_two_points_a_class_by_hand() -> None:
    x = torch.tensor([[0.0, 0.0], [2.0, 0.0], [9.0, 1.0], [11.0, 1.0]])
    found = class_moments(shifts(0.0, 1.0), [(x, torch.tensor([0, 0, 1, 1]))])
    assert found.mean(0).tolist() == [[1, 0], [10, 1]] and found.mean(1).tolist() == [[2, 1], [11, 2]]
    assert found.variance(1).tolist() == [[1, 0], [1, 0]]
    between = (4.5**2 + 0.5**2) / (4.5**2 + 0.5**2 + 1)
    assert found.between_L.tolist() == pytest.approx([between, between])


def test_it_equals_a_loop_over_items() -> None:
    found, items = class_moments(shifts(0.0, 2.0), data()), data()
    x_NC = torch.cat([x.double().mean(1) for x, _ in items])
    y_N = torch.cat([y for _, y in items])
    for k in range(3):
        torch.testing.assert_close(found.mean(1)[k], x_NC[y_N == k].mean(0) + 2)
        torch.testing.assert_close(found.variance(0)[k], x_NC[y_N == k].var(0, correction=0))


def test_parts_add_up_and_batches_do_not_matter() -> None:
    stack, items = shifts(0.0, 2.0), data()
    whole, parts = class_moments(stack, items), [class_moments(stack, [part], classes=3) for part in items]
    added = parts[0] + parts[1] + parts[2]
    joined = class_moments(stack, [(torch.cat([x for x, _ in items]), torch.cat([y for _, y in items]))])
    for other in (added, joined):
        assert torch.equal(whole.count_K, other.count_K)
        for layer in range(2):
            torch.testing.assert_close(whole.sums[layer], other.sums[layer])
            torch.testing.assert_close(whole.squares[layer], other.squares[layer])


def test_a_class_without_items_counts_for_nothing() -> None:
    with_gap = class_moments(shifts(0.0, 1.0), [(x, y * 2) for x, y in data()])
    assert torch.allclose(with_gap.between_L, class_moments(shifts(0.0, 1.0), data()).between_L)
    assert bool(with_gap.mean(0)[1].isnan().all())


def test_what_it_refuses() -> None:
    with pytest.raises(BadData, match="without labels"):
        class_moments(shifts(0.0, 1.0), [x for x, _ in data()])
    with pytest.raises(BadData, match="single class"):
        class_moments(shifts(0.0, 1.0), [(x, torch.ones_like(y)) for x, y in data()])
    with pytest.raises(BadModel, match=r"after layer 1 .* batch 0"):
        class_moments(shifts(0.0, float("nan")), data())
    one = class_moments(shifts(0.0, 1.0), data())
    with pytest.raises(BadData, match="two parts of one measurement"):
        _ = one + ClassMoments(one.count_K, one.sums[:1], one.squares[:1])
