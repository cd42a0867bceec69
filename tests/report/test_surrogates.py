"""Rank correlations of cheap scores with what was tried."""

from __future__ import annotations

import pytest

from layerwise.measure.scores import Column, Scores
from layerwise.report.surrogates import rank_agreement, sentence
from layerwise.spec import Attention, FeedForward, LayerSpec, StackSpec

SPEC = StackSpec("llama", 64, 96, (LayerSpec(Attention(2, 1, 32), FeedForward(128)),) * 4)


def column(name: str, *values: float, important: str | None = "high") -> Column:
    return Column(name, values, "", important, "about")  # type: ignore[arg-type]


def test_direction_and_order_decide() -> None:
    columns = [column("response:q", 1, 2, 3, 4), column("response:k", 0, 0, 0, 1), column("same", 10, 20, 30, 40),
               column("low", 4, 3, 2, 1, important="low"), column("against", 4, 3, 2, 1),
               column("cost", 1, 2, 3, 4, important=None), column("constant", 1, 1, 1, 1)]
    scores = Scores(SPEC, {one.name: one for one in columns})
    assert rank_agreement(scores) == pytest.approx({"same": 1.0, "low": 1.0, "against": -1.0})
    assert "against -1.00" in (sentence(scores) or "")


def test_nothing_is_said_where_nothing_was_tried() -> None:
    scores = Scores(SPEC, {"same": column("same", 1, 2, 3, 4)})
    assert rank_agreement(scores) == {} and sentence(scores) is None
