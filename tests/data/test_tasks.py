"""Multiple choice: the likeliest continuation is found, however rows are batched."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from layerwise.data import ChoiceItem, MultipleChoice, accuracy, scorer
from layerwise.data.tasks import Pair, encode
from layerwise.data.text import Tokenizer
from layerwise.errors import BadData

ITEMS = (
    ChoiceItem("one plus one is", (" two", " a hundred"), 0),
    ChoiceItem("the sky is", (" green and red", " blue"), 1),
    ChoiceItem("a", (" b", " c", " d"), 2),
)
TASK = MultipleChoice("small", ITEMS, "here")


def test_context_and_continuation_make_up_the_text(
        byte_tokenizer: Tokenizer, framed_tokenizer: Tokenizer) -> None:
    for context, continuation in encode(ITEMS[1], byte_tokenizer):
        assert bytes(context) == b"the sky is"
        assert bytes(continuation).startswith(b" ")
    [(context, continuation), _] = encode(ITEMS[0], framed_tokenizer)
    assert context == [256, *b"one plus one is"]
    assert continuation == [*b" two"]


def test_tokens_that_join_across_the_boundary_count_as_continuation() -> None:
    class Pairs:
        def encode(self, text: str) -> list[int]:
            return [int.from_bytes(text[i:i + 2].encode()) for i in range(0, len(text), 2)]

    ab, cd, cx, y = (int.from_bytes(pair) for pair in (b"ab", b"cd", b"cx", b"y"))
    assert encode(ChoiceItem("abc", ("d", "xy"), 0), Pairs()) == [([ab], [cd]), ([ab], [cx, y])]


def test_scores_equal_one_row_at_a_time(byte_tokenizer: Tokenizer) -> None:
    table_VV = torch.randn(256, 256, generator=torch.Generator().manual_seed(0)).double()

    seen: list[tuple[int, ...]] = []

    def logits(tokens_BT: Tensor) -> Tensor:
        seen.append(tuple(tokens_BT.shape))
        return table_VV[tokens_BT].cumsum(1)  # every position depends on all before it

    pairs = [pair for item in ITEMS for pair in encode(item, byte_tokenizer)]
    expected = []
    for context, continuation in pairs:
        ids = torch.tensor([context + continuation])
        log_TV = logits(ids)[0].log_softmax(-1)
        places = range(len(context) - 1, ids.shape[1] - 1)
        expected.append(sum(float(log_TV[place, ids[0, place + 1]]) for place in places))
    for tokens in (1, 3 * len(pairs[0][0] + pairs[0][1]), 1000):
        seen.clear()
        assert scorer(logits, tokens)(pairs) == pytest.approx(expected, rel=1e-5)
        assert all(rows == 1 or rows * length <= tokens for rows, length in seen)
    assert len(seen) == 1


def test_accuracy_counts_each_item(byte_tokenizer: Tokenizer) -> None:
    def by_length(pairs: list[Pair]) -> list[float]:
        return [-float(len(continuation)) for _, continuation in pairs]

    found = accuracy(by_length, TASK, byte_tokenizer)
    assert found.correct_N.tolist() == [1, 1, 0]
    assert found.value == pytest.approx(2 / 3)
    assert found.normalised_N.tolist() == [1, 0, 0]  # all alike per character, so the first wins
    assert found.change(found).value == 0
    assert found.interval().value == found.value
    assert TASK.chance == pytest.approx((1 / 2 + 1 / 2 + 1 / 3) / 3)


def test_take_keeps_order() -> None:
    assert TASK.take(2).items == ITEMS[:2]
    drawn = TASK.take(2, seed=3).items
    assert list(drawn) == sorted(drawn, key=ITEMS.index)


@pytest.mark.parametrize("item", [
    ChoiceItem("a", ("b",), 0), ChoiceItem("a", ("b", "c"), 2), ChoiceItem("a", ("b", ""), 0)])
def test_items_without_an_answer(item: ChoiceItem) -> None:
    with pytest.raises(BadData, match="item 0 of bad"):
        MultipleChoice("bad", (item,), "here")


def test_bad_scores_and_no_items(byte_tokenizer: Tokenizer) -> None:
    with pytest.raises(BadData, match="no items"):
        MultipleChoice("none", (), "nowhere")
    with pytest.raises(BadData, match="one finite score"):
        accuracy(lambda pairs: [float("nan")] * len(pairs), TASK, byte_tokenizer)
    with pytest.raises(BadData, match="has no tokens"):
        encode(ChoiceItem("", ("b", "c"), 0), byte_tokenizer)
