"""Rankings are what they are called, and the system runs from end to end."""

from __future__ import annotations

import pytest
import torch

from layerwise.data import text_blocks
from layerwise.stack.decoder import DecoderStack
from layerwise.systems.transform.reassess_layer_pruning import METRICS, rankings, without
from layerwise.testing import check_system


def test_rankings_are_permutations_and_the_tail_goes_from_the_end(small: DecoderStack) -> None:
    assert small.tokenizer is not None
    data = text_blocks("default", small.tokenizer, length=32, blocks=2)
    orders = rankings(small, data, seed=0)
    assert set(orders) == {*METRICS, "tail", "random 0", "random 1", "random 2"}
    assert all(sorted(order) == list(range(30)) for order in orders.values())
    assert orders["tail"][:7] == [29, 28, 27, 26, 25, 24, 23]
    assert orders == rankings(small, data, seed=0)
    assert orders["random 0"] != rankings(small, data, seed=1)["random 0"]


def test_dropped_layers_are_gone_and_the_others_keep_their_order(small: DecoderStack) -> None:
    cut = without(small, [3, 1])
    assert len(cut) == 28
    tokens_BT = torch.arange(12)[None]
    with small.skip(1), small.skip(3):
        assert torch.equal(cut(tokens_BT), small(tokens_BT))


def test_it_runs(small: DecoderStack) -> None:
    before, methods, tail = check_system("reassess-layer-pruning")
    assert set(before.measured["perplexity"]) == {*METRICS, "tail"}
    assert len(before.control["perplexity"]) == 3
    assert methods.holds is tail.holds is None


@pytest.mark.slow
def test_full_heals_both_cuts_both_ways_and_answers_questions(small: DecoderStack) -> None:
    _, methods, tail = check_system("reassess-layer-pruning", "full")
    assert methods.holds is not None and tail.holds is not None
    assert set(methods.control) >= {"best, lora", "tail, lora", "tail, head only"}
    assert "random 0, last 3" in tail.control
    assert all(set(found) == {"perplexity", "accuracy"} for found in tail.measured.values())


@pytest.mark.real
@pytest.mark.slow
def test_it_runs_on_the_real_model() -> None:
    check_system("reassess-layer-pruning")
