"""Prompts with a part that matters: where a subject's tokens lie, and answers that are one token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from layerwise.data.text import Tokenizer, encoder, frame
from layerwise.errors import BadData


@dataclass(frozen=True)
class Located:
    """A prompt's token ids, and which of them are its subject: `first` up to and with `last`."""

    tokens: tuple[int, ...]
    first: int
    last: int


def single_token(tokenizer: Tokenizer, answer: str) -> int:
    """The id of an answer, given with its leading space. Raises BadData where the tokenizer splits it."""
    before, after = frame(encoder(tokenizer))
    ids = encoder(tokenizer)(answer)
    ids = ids[len(before) : len(ids) - len(after)]
    if len(ids) != 1:
        raise BadData(
            f"the answer {answer!r}, which this tokenizer splits into {len(ids)} tokens",
            expected="an answer of one token, with the space that goes before it",
            do="leave it out, or track another word: the chance of a first piece is not that of the answer",
        )
    return ids[0]


def is_single_token(tokenizer: Tokenizer, answer: str) -> bool:
    """Whether `single_token` would give an id."""
    try:
        single_token(tokenizer, answer)
    except BadData:
        return False
    return True


def locate(tokenizer: Tokenizer, template: str, subject: str, prefix: str = "") -> Located:
    """The prompt `prefix + template` with `subject` in the place of {}, and where the subject lies in it.

    A token that holds both the end of the subject and what follows counts as the subject's last. Raises
    BadData for a template without {} or a subject without a token of its own.
    """
    if template.count("{}") != 1 or not subject:
        raise BadData(
            f"the template {template!r} with the subject {subject!r}",
            expected="one {} to be filled with some text",
            do="write the prompt with {} where the subject goes",
        )
    encode = encoder(tokenizer)
    _, after = frame(encode)

    def ids(text: str) -> list[int]:
        found = encode(text)
        return found[: len(found) - len(after)]

    before, _, _ = template.partition("{}")
    whole = ids(prefix + template.replace("{}", subject))
    first = _shared(whole, ids((prefix + before).rstrip()))
    last = max(first, _shared(whole, ids(prefix + before + subject)) - 1)
    if first >= len(whole):
        raise BadData(
            f"no token for the subject {subject!r}", expected="a subject of its own", do="choose another subject"
        )
    return Located(tuple(whole), first, last)


def _shared(whole: Sequence[int], part: Sequence[int]) -> int:
    """How many leading tokens are the same."""
    count = 0
    while count < min(len(whole), len(part)) and whole[count] == part[count]:
        count += 1
    return count
