"""Scores known by hand, and chances that do not depend on how far the prompts have come."""

from __future__ import annotations

import pytest
import torch

from layerwise.measure.edit_scores import Prompts, erasure, neighbourhood, rewrite
from layerwise.stack.decoder import DecoderStack

ROWS = [[1, 2, 3], [4, 5, 6, 7, 8]]


def t(*values: float) -> torch.Tensor:
    return torch.tensor(values)


def test_rewriting_is_the_share_of_what_was_missing() -> None:
    torch.testing.assert_close(rewrite(t(0.2, 0.2, 0.2, 0.0), t(1.0, 0.6, 0.1, 0.3)), t(1.0, 0.5, 0.0, 0.3))


def test_erasing_is_the_share_of_what_was_there() -> None:
    torch.testing.assert_close(erasure(t(0.8, 0.8, 0.8), t(0.0, 0.4, 0.9)), t(1.0, 0.5, 0.0))


def test_a_neighbour_scores_one_at_rest_and_zero_at_worst() -> None:
    torch.testing.assert_close(neighbourhood(t(0.3, 0.0, 1.0, 0.5), t(0.3, 1.0, 0.0, 1.0)), t(1.0, 0.0, 0.0, 0.0))


@pytest.mark.parametrize("layer", [0, 2, 4])
def test_chances_are_those_of_the_whole_model(tiny_stack: DecoderStack, layer: int) -> None:
    prompts = Prompts(tiny_stack, ROWS, [9, 10])
    prompts.advance(layer)
    expected = [tiny_stack(torch.tensor([row]))[0, -1].softmax(-1)[answer]
                for row, answer in zip(ROWS, [9, 10], strict=True)]
    torch.testing.assert_close(prompts.chances(), torch.stack(expected), atol=1e-6, rtol=1e-4)
