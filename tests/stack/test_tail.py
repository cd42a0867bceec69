"""Running only the end of rows equals running them whole, whatever their lengths; edits and gradients too."""

from __future__ import annotations

import pytest
import torch

from layerwise.errors import BadOption
from layerwise.stack import DecoderStack
from layerwise.stack.tail import Tail

ROWS = [[1, 2, 3, 4, 5], [6, 7, 8], [9, 10, 11, 12, 13, 14, 15]]
PLACES = [2, 0, 5]
CLOSE = {"atol": 1e-5, "rtol": 1e-5}  # float32 sums in another order


def whole(stack: DecoderStack, row: list[int]) -> torch.Tensor:
    return stack(torch.tensor([row]))[0, -1]  # type: ignore[no-any-return]


@pytest.mark.parametrize("places", [PLACES, [0, 0, 0], [4, 2, 6]])
@pytest.mark.parametrize("layer", [0, 3])
def test_the_end_equals_the_whole(tiny_stack: DecoderStack, places: list[int], layer: int) -> None:
    tail = Tail(tiny_stack, ROWS, places)
    state = tail.enter(layer)
    expected = torch.stack([whole(tiny_stack, row) for row in ROWS])
    for _ in range(2):
        torch.testing.assert_close(tail.last(tail.run(state)), expected, **CLOSE)


def test_an_edit_at_the_place_equals_one_in_the_whole(tiny_stack: DecoderStack) -> None:
    def change(place: int):  # type: ignore[no-untyped-def]
        def add(x_BTC: torch.Tensor) -> torch.Tensor:
            changed = x_BTC.clone()
            changed[:, place] += 1
            return changed
        return add

    expected = []
    for row, place in zip(ROWS, PLACES, strict=True):
        with tiny_stack.edit(2, "feed_forward", change(place)):
            expected.append(whole(tiny_stack, row))
    tail = Tail(tiny_stack, ROWS, PLACES)
    with tiny_stack.edit(2, "feed_forward", change(0)):
        found = tail.last(tail.run(tail.enter(2)))
    torch.testing.assert_close(found, torch.stack(expected), **CLOSE)


def test_gradients_of_the_end_equal_those_of_the_whole(tiny_stack: DecoderStack) -> None:
    def gradient(run, places: list[int]) -> torch.Tensor:  # type: ignore[no-untyped-def]
        shift_BC = torch.zeros(3, 32, requires_grad=True)

        def add(x_BTC: torch.Tensor) -> torch.Tensor:
            changed = x_BTC.clone()
            changed[torch.arange(3), places] += shift_BC
            return changed
        with tiny_stack.edit(1, "output", add):
            run().log_softmax(-1)[:, 7].sum().backward()
        assert shift_BC.grad is not None
        return shift_BC.grad

    tail = Tail(tiny_stack, ROWS, PLACES)
    state = tail.enter(1)
    filled = torch.tensor([row + [0] * (7 - len(row)) for row in ROWS])
    ends = torch.tensor([len(row) - 1 for row in ROWS])
    expected = gradient(lambda: tiny_stack(filled)[torch.arange(3), ends], PLACES)
    torch.testing.assert_close(gradient(lambda: tail.last(tail.run(state)), [0, 0, 0]), expected, **CLOSE)


def test_a_place_outside_its_row_is_refused(tiny_stack: DecoderStack) -> None:
    with pytest.raises(BadOption, match="place 3 in a row of 3"):
        Tail(tiny_stack, [[1, 2, 3]], [3])
