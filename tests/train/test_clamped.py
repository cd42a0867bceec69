"""Batched learning equals a plain loop, entries stay within their bounds, and the model is left alone."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from layerwise.stack import DecoderStack
from layerwise.train.clamped import Clamp, clamped
from layerwise.transform.model_editing import written
from layerwise.transform.wishes import last_matrix

ROWS, ANSWERS = [[1, 2, 3], [4, 5, 6, 7, 8]], [50, 60]
CLOSE = {"atol": 1e-5, "rtol": 1e-4}


def loss(stack: DecoderStack, row: list[int], answer: int) -> torch.Tensor:
    return F.cross_entropy(stack(torch.tensor([row]))[:, -1], torch.tensor([answer]))


def test_it_equals_a_loop_over_facts(tiny_stack: DecoderStack) -> None:
    clamp = Clamp(largest=2e-3, steps=6, rate=1e-3)
    found = clamped(tiny_stack, 1, ROWS, ANSWERS, clamp)
    start = last_matrix(tiny_stack, 1).clone()
    for row, answer, expected in zip(ROWS, ANSWERS, found, strict=True):
        weight = tiny_stack.decoder.layers[1].matrix("down").weight  # type: ignore[operator, union-attr]
        weight.requires_grad_(True)
        optimizer = torch.optim.Adam([weight], lr=clamp.rate)
        for _ in range(clamp.steps):
            optimizer.zero_grad()
            loss(tiny_stack, row, answer).backward()
            optimizer.step()
            with torch.no_grad():
                weight.clamp_(start - clamp.largest, start + clamp.largest)
        torch.testing.assert_close(expected, weight.detach(), **CLOSE)
        with torch.no_grad():
            weight.copy_(start)
        weight.requires_grad_(False)


def test_entries_stay_within_their_bounds_and_the_model_as_it_was(tiny_stack: DecoderStack) -> None:
    before = {name: tensor.clone() for name, tensor in tiny_stack.tensors()}
    found = clamped(tiny_stack, 2, ROWS, ANSWERS, Clamp(largest=1e-3, steps=10))
    assert float((found - last_matrix(tiny_stack, 2)).abs().max()) <= 1.001e-3
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny_stack.tensors())


def test_each_fact_is_better_known_in_its_own_matrix(tiny_stack: DecoderStack) -> None:
    found = clamped(tiny_stack, 1, ROWS, ANSWERS, Clamp(largest=1e-2, rate=5e-3))
    for row, answer, matrix in zip(ROWS, ANSWERS, found, strict=True):
        before = loss(tiny_stack, row, answer)
        with written(tiny_stack, {1: matrix}):
            assert loss(tiny_stack, row, answer) < before


def test_a_fact_that_is_known_already_learns_no_more(tiny_stack: DecoderStack) -> None:
    once = clamped(tiny_stack, 1, ROWS, ANSWERS, Clamp(steps=2, enough=1e9, patience=3))
    stopped = clamped(tiny_stack, 1, ROWS, ANSWERS, Clamp(steps=9, enough=1e9, patience=3))
    assert torch.equal(once, stopped)
