"""Mean depths by hand, prompts of one length, and the system from end to end."""

from __future__ import annotations

import random

import pytest

import layerwise as lw
from layerwise.systems.measure.cross_modal_flow import HUES, THINGS, _prompt, _text, depth
from layerwise.testing import check_system
from tests.systems.seeing_world import credulous  # noqa: F401


def test_depth_is_the_mean_centre_by_loss() -> None:
    assert depth([0, -30, -10, 5]) == 1.25
    assert depth([-1, 0, -1], [2, 7, 12]) == 7
    assert depth([0, 3]) is None


def test_a_prompt_asks_for_a_thing_that_the_example_does_not_answer() -> None:
    for seed in range(50):
        (facts, example, question), (hue, other) = _prompt(random.Random(seed))
        asked = next(thing for thing in THINGS if f"the {thing}?" in question)
        assert f"The {asked} is {hue}." in facts
        assert f" {other}." in facts
        assert hue.capitalize() not in example
        assert f"the {asked}?" not in example
        assert hue in HUES


@pytest.mark.usefixtures("credulous")
def test_every_line_about_pictures_runs() -> None:
    assert len(check_system("cross-modal-flow")) == 3


@pytest.mark.slow
def test_it_runs() -> None:
    check_system("cross-modal-flow")


@pytest.mark.real
@pytest.mark.slow
def test_prompts_have_one_length_and_the_text_part_runs() -> None:
    tokenizer = lw.open("smollm2").tokenizer
    lengths = {tuple(len(tokenizer.encode(part)) for part in _prompt(random.Random(seed))[0]) for seed in range(100)}
    assert len(lengths) == 1
    assert len(_text(0, items=8, batch=4)) == 2
