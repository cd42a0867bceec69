"""Sums with results of one digit, their prompts, and answers at every depth."""

from __future__ import annotations

import random

import torch

from layerwise.stack.decoder import DecoderStack
from layerwise.systems.asking import OTHER, RULES, SIGNS, Asking, Sum, items, read


def test_every_step_on_the_way_has_the_same_result() -> None:
    assert Sum(5, "+", 3).reasoning == "5 + 3 = 6 + 2 = 8"
    assert Sum(7, "-", 2).reasoning == "7 - 2 = 6 - 1 = 5"
    assert Sum(3, "*", 2).reasoning == "3 * 2 = 3 + 3 = 6"
    for item in items(200, SIGNS, random.Random(0)):
        question, step, result = item.reasoning.split(" = ")
        assert eval(question) == eval(step) == int(result) == item.result


def test_items_have_one_digit_throughout() -> None:
    found = items(200, SIGNS, random.Random(0))
    assert all(0 <= s.result <= 9 for s in found)
    assert {s.sign for s in found} == set(SIGNS)
    assert {len(s.question) for s in found} == {7}
    assert {s.sign for s in items(50, "+", random.Random(0))} == {"+"}


def test_prompts_end_where_the_answer_begins(small: DecoderStack) -> None:
    asking, sums = Asking(small, 0), items(3, SIGNS, random.Random(1))
    rows, place = asking.rows(sums)
    assert [bytes(row[place:]).decode() for row in rows] == [f"{s.question} " for s in sums]
    assert len({len(row) for row in rows}) == 1
    assert asking.answer(torch.tensor([[48, 57], [10, 49]])).tolist() == [[0, 9], [OTHER, 1]]


def test_readings_equal_a_plain_pass(small: DecoderStack) -> None:
    asking, sums = Asking(small, 0), items(5, SIGNS, random.Random(1))
    found = read(asking, sums, batch=2)
    rows, _ = asking.rows(sums)
    logits_NV = small(torch.tensor(rows))[:, -1].float()
    assert found.lens_ND.shape == (5, 31)
    assert found.rules_NR.shape == (5, len(RULES))
    assert found.samples_NS.shape == (5, 10)
    torch.testing.assert_close(found.certainty_N, logits_NV.softmax(-1).amax(-1), atol=0.02, rtol=0.1)
    agree = (found.rules_NR[:, 0] == asking.answer(logits_NV.argmax(-1))).float().mean()
    assert float(agree) >= 0.8  # bfloat16 with cached keys can turn a near tie
