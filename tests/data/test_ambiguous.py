"""Questions come in equal numbers for both senses, and windows of words are cut where they should be."""

from __future__ import annotations

from collections import Counter

import pytest

from layerwise.data.ambiguous import WORDS, items
from layerwise.data.spans import Span, covered, deleted, spans
from layerwise.errors import BadOption


def test_both_senses_are_asked_for_equally_often() -> None:
    found = items(WORDS)
    counts = Counter((item.group, item.right.kinds) for item in found)
    assert len(counts) == 2 * len(WORDS) and len(WORDS) >= 12
    for entry in WORDS:
        one, two = entry.senses
        assert counts[entry.word, one.kinds] == counts[entry.word, two.kinds] == len(one.cues)
        assert not set(one.kinds) & set(two.kinds), entry.word


def test_a_question_and_what_is_told() -> None:
    item = items(WORDS)[0]
    assert item.text == "I am on a fishing boat and I see a bass. The bass is a kind of"
    assert item.told == "This bass is a kind of fish. " and item.wrong.kinds[0] == "instrument"


def test_windows_of_every_size_that_leaves_a_word() -> None:
    assert spans("a b c d", (3, 5)) == [Span(0, 3), Span(1, 4)]
    assert len(spans("a b c d", (1, 2))) == 7 and spans("a b", (3,)) == []


def test_covering_keeps_the_length_and_deleting_does_not() -> None:
    assert covered("a b c d", Span(1, 3), "x") == "a x x d"
    assert deleted("a b c d", Span(1, 3)) == "a d"


@pytest.mark.parametrize("sizes", [(), (0,)])
def test_windows_have_words(sizes: tuple[int, ...]) -> None:
    with pytest.raises(BadOption, match="at least one"):
        spans("a b", sizes)
