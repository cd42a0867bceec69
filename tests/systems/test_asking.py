"""Sums with results of one digit, their prompts, and answers at every depth."""

from __future__ import annotations

import random

import torch

from layerwise.stack.decoder import DecoderStack
from layerwise.systems.asking import OPERATIONS, OTHER, RULES, Asking, Sum, items, read


def test_a_sum_knows_its_middle_and_result() -> None:
    made = Sum((5, 3, 2), "+-")
    assert (made.middle, made.result) == (8, 6)
    assert made.question == "5 + 3 - 2 ="
    assert made.reasoning == "5 + 3 - 2 = 8 - 2 = 6"
    assert Sum((9, 1, 3), "--").result == 5


def test_items_have_one_digit_throughout() -> None:
    found = items(200, OPERATIONS, random.Random(0))
    assert all(0 <= s.middle <= 9 and 0 <= s.result <= 9 for s in found)
    assert {s.operations for s in found} == set(OPERATIONS)
    assert len({len(s.question) for s in found}) == 1


def test_prompts_end_where_the_answer_begins(small: DecoderStack) -> None:
    asking, sums = Asking(small, 0), items(3, OPERATIONS, random.Random(1))
    rows, place = asking.rows(sums)
    assert [bytes(row[place:]).decode() for row in rows] == [f"{s.question} " for s in sums]
    assert len({len(row) for row in rows}) == 1
    assert asking.answer(torch.tensor([[48, 57], [10, 49]])).tolist() == [[0, 9], [OTHER, 1]]


def test_readings_equal_a_plain_pass(small: DecoderStack) -> None:
    asking, sums = Asking(small, 0), items(5, OPERATIONS, random.Random(1))
    found = read(asking, sums, batch=2)
    rows, _ = asking.rows(sums)
    logits_NV = small(torch.tensor(rows))[:, -1].float()
    assert found.lens_ND.shape == (5, 31)
    assert found.rules_NR.shape == (5, len(RULES))
    assert found.samples_NS.shape == (5, 10)
    torch.testing.assert_close(found.certainty_N, logits_NV.softmax(-1).amax(-1), atol=0.02, rtol=0.1)
    agree = (found.rules_NR[:, 0] == asking.answer(logits_NV.argmax(-1))).float().mean()
    assert float(agree) >= 0.8  # bfloat16 with cached keys can turn a near tie
