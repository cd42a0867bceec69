"""The system from end to end, and how responses are read."""

from __future__ import annotations

import pytest
import torch

from layerwise.stack.decoder import DecoderStack
from layerwise.systems.asking import OTHER, Asking, Sum
from layerwise.systems.measure import internal_consistency
from layerwise.testing import check_system


def test_a_response_is_its_last_digit_before_the_line_ends(
    small: DecoderStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = [b"8 - 2 = 6\n", b"6\n 7 8 9 0", b"6 so\n 12345", b"no end  12"]
    tokens_NDA = torch.tensor([list(line[:9]) for line in said])[None]
    monkeypatch.setattr(internal_consistency, "draws", lambda *_: tokens_NDA)
    found = internal_consistency._responses(Asking(small, 0), [Sum(5, "+", 3)])
    assert found.tolist() == [[6, 6, OTHER, 1]]


def test_it_runs(small: DecoderStack) -> None:
    assert len(check_system("internal-consistency")) == 4


@pytest.mark.real
@pytest.mark.slow
def test_it_runs_on_the_real_model() -> None:
    check_system("internal-consistency")
