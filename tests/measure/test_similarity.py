"""CKA against its closed form, its invariances and its control; drift against plain norms."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from layerwise.errors import BadData
from layerwise.measure.similarity import cka, drift, similarity, states
from layerwise.stack.module import ModuleStack
from layerwise.testing.stacks import random_stack
from layerwise.transform.quantize import Quantize


def clouds(*widths: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(40, width, generator=generator) for width in widths]


def closed_form(x_PC: Tensor, y_PD: Tensor) -> float:
    x, y = (m.double() - m.double().mean(0) for m in (x_PC, y_PD))
    return float((x.T @ y).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm()))


def test_it_is_the_closed_form_for_any_widths() -> None:
    a, b = clouds(5, 8), clouds(8, 3, 6)[1:]
    expected = [[closed_form(x, y) for y in b] for x in a]
    torch.testing.assert_close(cka(a, b), torch.tensor(expected, dtype=torch.float64))


def test_rotation_scale_and_shift_change_nothing() -> None:
    (x_PC,) = clouds(6)
    turn_CC = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(1)))[0]
    assert cka([x_PC], [3 * x_PC @ turn_CC + 2]).item() == pytest.approx(1, abs=1e-6)


def test_a_model_is_like_itself_and_shuffled_tokens_are_not() -> None:
    stack = random_stack(3)
    tokens_NT = torch.randint(97, (8, 32), generator=torch.Generator().manual_seed(2))
    found_LM, chance = similarity(stack, stack, tokens_NT)
    torch.testing.assert_close(found_LM.diag(), torch.ones(3, dtype=torch.float64))
    assert chance < 0.8 * float(found_LM.min())
    assert len(states(stack, tokens_NT, points=16)[0]) == 16


def test_drift_is_the_relative_norm() -> None:
    a, b = random_stack(2), random_stack(2)
    row, block = b.spec.rows[1], b.block(1)
    packed = Quantize(3, group=32).apply(block, row)
    with b.swap(1, packed):
        moved = drift(a, b)
    assert set(moved[0].values()) == {0.0}
    weight, rounded = block.matrix("q").weight, packed.matrix("q").dense()  # type: ignore[union-attr]
    assert moved[1]["q"] == pytest.approx(float((rounded - weight).norm() / weight.norm()), rel=1e-5)


def test_other_tokenizers_are_refused() -> None:
    with pytest.raises(BadData, match="vocabularies of 97 and 50"):
        similarity(random_stack(2), random_stack(2, vocabulary=50), torch.zeros(2, 4, dtype=torch.int64))


def test_modules_of_other_shapes_are_compared_item_by_item() -> None:
    class Shrinking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(*[nn.Conv2d(3, 3, 3, padding=1) for _ in range(3)], nn.AvgPool2d(2),
                                        *[nn.Conv2d(3, 3, 3, padding=1) for _ in range(3)])

        def forward(self, x: Tensor) -> Tensor:
            return self.layers(x)  # type: ignore[no-any-return]

    torch.manual_seed(0)
    stack = ModuleStack(Shrinking().requires_grad_(False), blocks=lambda module: isinstance(module, nn.Conv2d))
    pictures = [torch.randn(6, 3, 8, 8), torch.randn(6, 3, 8, 8)]
    found_LM, chance = similarity(stack, stack, pictures)
    assert torch.allclose(found_LM.diagonal(), torch.ones(6, dtype=torch.float64)) and chance < 0.9
    with stack.capture("output") as seen:
        stack(torch.cat(pictures))
    means = [seen[layer, "output"].mean((2, 3)) for layer in range(6)]
    assert torch.allclose(found_LM, cka(means, means), atol=1e-5)


@pytest.mark.parametrize("other", [1, 2])
def test_data_that_one_of_two_modules_cannot_read_is_named(other: int) -> None:
    fits, wide = (ModuleStack(nn.Sequential(nn.Linear(width, 4), nn.Linear(4, 4)), ["0", "1"]) for width in (6, 7))
    pair = (fits, wide) if other == 1 else (wide, fits)
    with pytest.raises(BadData, match=r"a first batch \(\[5, 6\]\) on which Sequential fails"):
        similarity(*pair, [torch.randn(5, 6)])
