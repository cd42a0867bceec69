"""Cutting, swapping and freezing from kept states against whole passes with the same edits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from layerwise.errors import BadOption
from layerwise.measure.trace import Trace, change, window
from layerwise.stack.changes import at, edits, put
from layerwise.stack.knockout import knockout
from layerwise.testing.stacks import random_stack

STACK = random_stack()
TOKENS = torch.randint(97, (3, 8), generator=torch.Generator().manual_seed(0))
OTHER = torch.randint(97, (3, 8), generator=torch.Generator().manual_seed(1))
PLACES = torch.zeros(1, 8, dtype=torch.bool)
PLACES[:, 1:4] = True


def last(logits_BTV: Tensor) -> Tensor:
    return logits_BTV[:, -1].log_softmax(-1)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_the_prediction_is_the_models_own_and_the_lens_at_other_depths() -> None:
    trace = Trace(STACK, TOKENS)
    close(trace.prediction(), last(STACK(TOKENS)))
    close(trace.prediction(2), last(STACK.finish(STACK.run(STACK.start(TOKENS), slice(0, 2)))))


def test_another_place_can_predict() -> None:
    places = torch.tensor([1, 5, 7])
    expected = STACK(TOKENS)[torch.arange(3), places].log_softmax(-1)
    close(Trace(STACK, TOKENS, places).prediction(), expected)


@pytest.mark.parametrize("layers", [range(0, 1), range(1, 3), range(0, 4)])
def test_a_cut_equals_a_whole_pass_with_the_cut(layers: range) -> None:
    target = torch.zeros(1, 8, dtype=torch.bool)
    target[:, -1] = True
    with knockout(STACK, PLACES, target, layers):
        expected = last(STACK(TOKENS))
    close(Trace(STACK, TOKENS).cut(PLACES, target, layers), expected)
    assert torch.equal(Trace(STACK, TOKENS).cut(PLACES, target, range(0)), Trace(STACK, TOKENS).prediction())


@pytest.mark.parametrize("depth", range(4))
def test_a_swap_equals_a_patched_pass(depth: int) -> None:
    trace, other = Trace(STACK, TOKENS), Trace(STACK, OTHER)
    with STACK.patch(depth, "input", other.states[depth].hidden[:, 1:4], slice(1, 4)):
        expected = last(STACK(TOKENS))
    close(trace.swapped(other, PLACES, depth), expected)


def test_swapping_everything_gives_the_other_run_and_the_end_is_too_late() -> None:
    trace, other = Trace(STACK, TOKENS), Trace(STACK, OTHER)
    close(trace.swapped(other, torch.ones(1, 8, dtype=torch.bool), 2), other.prediction())
    close(trace.swapped(other, PLACES, 4), trace.prediction())
    with pytest.raises(BadOption, match="shapes"):
        trace.swapped(Trace(STACK, OTHER[:, :5]), PLACES, 0)


@pytest.mark.parametrize(("start", "stop"), [(0, 3), (1, 2), (2, 2)])
def test_freezing_equals_a_pass_with_the_state_put_back(start: int, stop: int) -> None:
    trace = Trace(STACK, TOKENS)
    held = at(PLACES, put(trace.states[start].hidden))
    with edits(STACK, "input", dict.fromkeys(range(start, stop + 1), held)):
        expected = last(STACK(TOKENS))
    close(trace.frozen(PLACES, start, stop), expected)


def test_windows_are_the_published_ones() -> None:
    assert window(10, 9, 40) == range(6, 15)
    assert window(0, 9, 40) == range(0, 5)
    assert window(39, 9, 40) == range(35, 40)
    assert window(3, 1, 8) == range(3, 4)
    assert window(3, 2, 8) == range(2, 4)


def test_change_is_in_percent() -> None:
    before, after = torch.tensor([0.5, 0.2]).log(), torch.tensor([0.25, 0.3]).log()
    torch.testing.assert_close(change(before, after).float(), torch.tensor([-50.0, 50.0]))
