"""Subjects are found among the tokens, and answers that are split are refused."""

from __future__ import annotations

import pytest

from layerwise.data.facts import RELATIONS, facts
from layerwise.data.prompts import locate, single_token
from layerwise.data.words import WordTokenizer
from layerwise.errors import BadData

WORDS = WordTokenizer(["The capital of New Guinea is Rome .", "However , France's"])


class Framed:
    """Bytes between two special tokens."""

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        ids = list(text.encode())
        return [256, *ids, 257] if special else ids


def test_words_and_marks_are_tokens() -> None:
    ids = WORDS.encode("The capital, of Rome")
    assert WORDS.decode(ids) == "The capital , of Rome" and len(ids) == 5
    assert WORDS.words == tuple(sorted(WORDS.words)) and WORDS.vocabulary == len(set(WORDS.words))


def test_a_word_that_was_never_given_is_refused() -> None:
    with pytest.raises(BadData, match="'Paris'"):
        WORDS.encode("Paris is Rome")


def test_a_subject_is_found() -> None:
    found = locate(WORDS, "The capital of {} is", "New Guinea")
    assert (found.first, found.last, len(found.tokens)) == (3, 4, 6)


def test_a_prefix_moves_the_subject() -> None:
    found = locate(WORDS, "The capital of {} is", "Rome", prefix="However, ")
    assert (found.first, found.last) == (5, 5) and WORDS.decode([found.tokens[5]]) == "Rome"


def test_a_subject_may_come_first_or_last() -> None:
    assert (locate(WORDS, "{} is", "New Guinea").first, locate(WORDS, "The {}", "Rome").last) == (0, 1)


def test_special_tokens_go_before_but_not_after() -> None:
    found = locate(Framed(), "a {} b", "cd")
    assert found.tokens == (256, *b"a cd b") and bytes(found.tokens[found.first : found.last + 1]) == b" cd"


@pytest.mark.parametrize(("template", "subject"), [("no place", "x"), ("{} and {}", "x"), ("a {}", "")])
def test_a_prompt_needs_one_subject(template: str, subject: str) -> None:
    with pytest.raises(BadData, match="to be filled"):
        locate(WORDS, template, subject)


def test_an_answer_is_one_token() -> None:
    assert WORDS.words[single_token(WORDS, " Rome")] == "Rome"
    assert single_token(Framed(), "a") == ord("a")
    with pytest.raises(BadData, match="splits into 2"):
        single_token(WORDS, " New Guinea")


def test_facts_are_those_with_answers_of_one_token() -> None:
    assert facts(Framed()) == []
    tokenizer = WordTokenizer([" ".join(answer for relation in RELATIONS for answer in relation.answers.values())])
    every = facts(tokenizer)
    assert len(every) == sum(len(relation.answers) for relation in RELATIONS)
    assert every[0].prompt == "The capital of France is" and every[0].answer == " Paris"


def test_every_wording_has_a_place_for_the_subject() -> None:
    for relation in RELATIONS:
        assert all(text.count("{}") == 1 for text in (relation.template, *relation.paraphrases))
