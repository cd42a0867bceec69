"""How much text changes are tried on: more of it for what a plan may want, two blocks for what it cannot."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from layerwise.allocate.budget import Budget
from layerwise.data.text import Source, TextData
from layerwise.errors import BadOption
from layerwise.measure.scores import Scores
from layerwise.report.alternatives import parse_alternatives
from layerwise.report.decide import Decide
from layerwise.report.optimize import measured_for, optimize, parted
from layerwise.report.run import Run
from layerwise.stack.decoder import DecoderStack
from layerwise.testing.stacks import random_stack


def text(blocks: int) -> TextData:
    tokens_NT = torch.randint(97, (blocks, 24), generator=torch.Generator().manual_seed(1))
    return TextData(tokens_NT, "random", Source("random", None, "", tokens_NT.numel(), tuple(range(blocks))))


def measured(stack: DecoderStack, trials: int, folder: Path, budget: Budget) -> tuple[Scores, Decide, list[str]]:
    said: list[str] = []
    decide = Decide(budget, parse_alternatives(["4/32", "drop", "drop-attention"], stack.spec))
    calibration, trial = parted(text(12), trials)
    with Run.open(folder, "optimize", {"trials": trials}) as run:
        scores = measured_for(stack, calibration, trial, decide.alternatives, 0, run, said.append, False,
                              lambda found: decide(found, "milp"))
    return scores, decide, said


def stopped(scores: Scores) -> dict[str, dict[str, float]]:
    parts = scores.provenance.get("merged", [scores.provenance])
    return next((part["stopped"] for part in parts if "stopped" in part), {})


@pytest.mark.parametrize(("trials", "left"), [(2, False), (6, True)])
def test_on_more_text_some_parts_are_left_after_two_blocks(trials: int, left: bool, tmp_path: Path) -> None:
    stack = random_stack(3)
    scores, decide, said = measured(stack, trials, tmp_path, Budget(bytes=0.5))
    assert bool(stopped(scores)) == left == any("too bad for any plan" in words for words in said)
    assert all((note["blocks"], note["of"]) == (2, trials) for note in stopped(scores).values())
    assert decide(scores, "milp").predicted["bytes"] <= 0.5 * stack.spec.bytes()


def test_blocks_for_statistics_and_for_trials_are_apart() -> None:
    whole = text(12)
    for trials, tried in ((1, 1), (2, 2), (5, 5), (9, 6)):
        statistics, trial = parted(whole, trials)
        assert (len(statistics), len(trial)) == (12 - tried, tried)


def test_no_text_to_try_anything_on(tmp_path: Path) -> None:
    with Run.open(tmp_path, "optimize", {}) as run, pytest.raises(BadOption, match="trials=0"):
        optimize("no such model", Budget(bytes=0.5), run, trials=0)
