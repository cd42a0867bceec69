"""States copied between runs: one's own change nothing, another's do what an edit of the whole run does."""

from __future__ import annotations

import torch

from layerwise.measure.swap_states import drift, place_states, swapped
from layerwise.stack.decoder import DecoderStack

ROWS, OTHER = [[1, 2, 3, 9], [4, 5, 6, 7, 8]], [[11, 12, 13], [14, 15, 16, 17]]
PLACES, OTHER_PLACES = [1, 3], [2, 0]
CLOSE = {"atol": 1e-5, "rtol": 1e-4}


def test_states_are_those_of_each_row_alone(tiny_stack: DecoderStack) -> None:
    states_LBC = place_states(tiny_stack, ROWS, PLACES)
    assert states_LBC.shape == (5, 2, 32)
    for row, (tokens, place) in enumerate(zip(ROWS, PLACES, strict=True)):
        with tiny_stack.capture("input", "output") as seen:
            tiny_stack(torch.tensor([tokens]))
        for layer in range(4):
            torch.testing.assert_close(states_LBC[layer, row], seen[layer, "input"][0, place], **CLOSE)
        torch.testing.assert_close(states_LBC[4, row], seen[3, "output"][0, place], **CLOSE)


def test_own_states_change_nothing(tiny_stack: DecoderStack) -> None:
    expected = torch.stack([tiny_stack(torch.tensor([row]))[0, -1] for row in ROWS])
    for logits_BV in swapped(tiny_stack, ROWS, PLACES, place_states(tiny_stack, ROWS, PLACES), range(4)):
        torch.testing.assert_close(logits_BV, expected, **CLOSE)


def test_other_states_do_what_a_patch_does(tiny_stack: DecoderStack) -> None:
    states_LBC = place_states(tiny_stack, OTHER, OTHER_PLACES)
    for layer, logits_BV in zip([0, 2], swapped(tiny_stack, ROWS, PLACES, states_LBC, [0, 2]), strict=True):
        for row, (tokens, place) in enumerate(zip(ROWS, PLACES, strict=True)):
            with tiny_stack.patch(layer, "input", states_LBC[layer, row], slice(place, place + 1)):
                torch.testing.assert_close(logits_BV[row], tiny_stack(torch.tensor([tokens]))[0, -1], **CLOSE)


def test_drift_is_zero_for_the_same_and_two_for_the_opposite() -> None:
    states_LBC = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(drift(states_LBC, 3 * states_LBC), torch.zeros(2, 3), atol=1e-6, rtol=0)
    torch.testing.assert_close(drift(states_LBC, -states_LBC), torch.full((2, 3), 2.0))
