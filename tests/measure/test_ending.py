"""The end of a pass compares the same whether its logits are kept or made again, and in however many parts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from layerwise.data import metrics
from layerwise.measure.ending import Ending, kl

VOCABULARY, WIDTH = 50, 16


def endings(positions: int) -> tuple[Ending, Ending, list[int]]:
    """Two of them, and how many rows the head of the first was given each time."""
    generator, asked = torch.Generator().manual_seed(0), []
    a, b = torch.randn(2, positions, WIDTH, generator=generator)
    table_VC, targets_P = torch.randn(VOCABULARY, WIDTH, generator=generator), torch.arange(positions) % VOCABULARY

    def head(rows_PC: Tensor) -> Tensor:
        asked.append(len(rows_PC))
        return rows_PC @ table_VC.T

    plain = Ending(b, targets_P, lambda rows_PC: rows_PC @ table_VC.T, VOCABULARY)
    return Ending(a, targets_P, head, VOCABULARY), plain, asked


def test_divergence_and_loss_are_those_of_all_logits_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "LOGITS", 7 * VOCABULARY)
    monkeypatch.setattr(metrics, "CHUNK", 3 * VOCABULARY)
    original, changed, asked = endings(WIDTH)
    p_PV, q_PV = (end.head(end.hidden_PC).log_softmax(-1) for end in (original, changed))
    assert kl(original, changed) == pytest.approx(float((p_PV.exp() * (p_PV - q_PV)).sum(-1).mean()), rel=1e-5)
    assert original.loss == pytest.approx(float(F.nll_loss(p_PV, original.targets_P)), rel=1e-5)
    assert asked[1:] == [7, 7, 2] * 2


@pytest.mark.parametrize(("positions", "times"), [(WIDTH, 1), (WIDTH + 1, 3)])
def test_one_that_stays_is_made_once_where_it_takes_no_more_room_than_the_head(positions: int, times: int) -> None:
    original, changed, asked = endings(positions)
    stays = replace(original, stays=True)
    found = [kl(stays, changed) for _ in range(3)]
    assert len(asked) == times and found == [kl(original, changed)] * 3
