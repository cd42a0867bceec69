"""Operations and bytes of products that are counted by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from layerwise.measure.traffic import Traffic


def test_a_product_by_hand() -> None:
    a, b = torch.ones(3, 5), torch.ones(5, 7)
    with Traffic() as traffic:
        a @ b
    assert traffic.operations == 2 * 3 * 5 * 7
    assert traffic.moved == 4 * (3 * 5 + 5 * 7 + 3 * 7)
    assert traffic.intensity == traffic.operations / traffic.moved


@pytest.mark.parametrize("inference", [True, False])
def test_a_convolution_by_hand(inference: bool) -> None:
    conv, x = nn.Conv2d(2, 6, 3, padding=1, groups=2), torch.ones(1, 2, 8, 8)
    with torch.inference_mode(inference), Traffic() as traffic:
        conv(x)
    assert traffic.operations == 2 * (8 * 8) * 6 * (2 // 2) * 9
    assert traffic.moved == 4 * (2 * 64 + 6 * 9 + 6 + 6 * 64)


def test_half_the_width_moves_half_the_bytes() -> None:
    a = torch.ones(4, 4, dtype=torch.bfloat16)
    with Traffic() as traffic:
        a @ a
    assert traffic.moved == 2 * 3 * 16


def test_elementwise_work_is_left_out() -> None:
    with Traffic() as traffic:
        torch.ones(10) + 1
    assert (traffic.operations, traffic.moved, traffic.intensity) == (0, 0, 0)


def test_sums_add_up_over_calls() -> None:
    layer, x = nn.Linear(4, 8), torch.ones(2, 4)
    with torch.no_grad(), Traffic() as once:
        layer(x)
    with torch.no_grad(), Traffic() as twice:
        layer(x)
        layer(x)
    assert twice.operations == 2 * once.operations
    assert twice.moved == 2 * once.moved == 2 * 4 * (2 * 4 + 4 * 8 + 8 + 2 * 8)
