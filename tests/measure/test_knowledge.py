"""What is lost of facts without a feed-forward half: nothing where it writes nothing, all as starting over."""

from __future__ import annotations

import math

import pytest
import torch

from layerwise.data.prompts import Located
from layerwise.measure.knowledge import lost, places
from layerwise.stack.decoder import DecoderStack

PROMPTS = [Located((5, 6, 7, 8), 1, 2), Located((9, 3, 4), 0, 0), Located((2, 11, 12, 13, 14), 2, 3)]
ANSWERS = [20, 21, 22]


def test_places_are_the_subjects_tokens() -> None:
    assert places(PROMPTS).tolist() == [[False, True, True, False, False], [True, False, False, False, False],
                                        [False, False, True, True, False]]


def test_equals_starting_over_one_prompt_at_a_time(stack: DecoderStack) -> None:
    chance, found = lost(stack, PROMPTS, ANSWERS)
    clean = [float(stack(torch.tensor([p.tokens]))[0, -1].double().softmax(-1)[a])
             for p, a in zip(PROMPTS, ANSWERS, strict=True)]
    assert chance == pytest.approx(sum(clean) / 3, rel=1e-5)
    for layer in range(len(stack)):
        total = 0.0
        for prompt, answer, before in zip(PROMPTS, ANSWERS, clean, strict=True):
            def blank(x_BTC: torch.Tensor, prompt: Located = prompt) -> torch.Tensor:
                x_BTC = x_BTC.clone()
                x_BTC[:, prompt.first : prompt.last + 1] = 0
                return x_BTC
            with stack.edit(layer, "feed_forward", blank):
                after = float(stack(torch.tensor([prompt.tokens]))[0, -1].double().softmax(-1)[answer])
            total += math.log(before) - math.log(after)
        assert found[layer] == pytest.approx(total / 3, abs=1e-5)


def test_a_half_that_writes_nothing_holds_nothing(stack: DecoderStack) -> None:
    twin = stack.copied()
    with torch.no_grad():
        twin.block(1).matrix("down").weight.zero_()  # type: ignore[operator]
    _, found = lost(twin, PROMPTS, ANSWERS)
    assert found[1] == 0 and found[0] != 0 and found[2] != 0


def test_what_the_last_layer_writes_at_a_subject_before_the_end_is_not_read(stack: DecoderStack) -> None:
    assert lost(stack, PROMPTS, ANSWERS)[1][-1] == 0
