"""Guesses of what comes next, to be verified in one pass: from the text itself, from some layers, or a second model.

A guess costs nothing but time: a token is kept only where it is the one the model draws at that place, so what a
request gets is the same with any drafter (`accepted`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence as Many

from layerwise.serve.runner import Runner
from layerwise.serve.sequence import Row, Sequence


def accepted(drafts: Many[int], drawn: Many[int]) -> int:
    """How many guesses are what was drawn in their places; `drawn` has one token more, which comes after them."""
    count = 0
    while count < len(drafts) and drafts[count] == drawn[count]:
        count += 1
    return count


class Drafter(ABC):
    """Fills the `drafts` of rows that have room for them; `most` is how many it ever makes for a row."""

    most: int

    @abstractmethod
    def begin(self, runner: Runner) -> None:
        """An engine with this runner will ask for guesses."""

    @abstractmethod
    def draft(self, rows: Many[Row]) -> None:
        """Guess the tokens after each row's last; called before the rows run, also for rows without room."""

    @abstractmethod
    def forget(self, sequence: Sequence) -> None:
        """A sequence has ended, or has lost its cache."""


class Lookup(Drafter):
    """Prompt lookup: what followed the last `longest` to `shortest` tokens when they came before.

    A sequence gets twice as many guesses as before where all were right, up to `most`, and otherwise one more than
    were: what was said twice will be said again, and wrong guesses cost time. Seven guesses and the token before them
    fill two tiles of four rows, as torch's int4 kernel has them.
    """

    def __init__(self, most: int = 7, longest: int = 4, shortest: int = 2) -> None:
        self.most, self.longest, self.shortest = most, longest, shortest
        self._seen: dict[Sequence, _Seen] = {}

    def begin(self, runner: Runner) -> None:
        """Nothing is needed of the model."""

    def draft(self, rows: Many[Row]) -> None:
        for row in rows:
            if row.room:
                seen = self._seen.setdefault(row.sequence, _Seen(self.shortest, self.longest, self.most))
                seen.learn(row.sequence, self.most)
                row.drafts = seen.after(row.sequence.tokens, min(row.room, seen.limit))

    def forget(self, sequence: Sequence) -> None:
        self._seen.pop(sequence, None)


class _Seen:
    """Where every run of some lengths was last seen in one sequence, and how many guesses are worth making."""

    def __init__(self, shortest: int, longest: int, limit: int = 7) -> None:
        self.sizes = range(longest, shortest - 1, -1)
        self.places: dict[tuple[int, ...], int] = {}
        self.known = 0
        self.limit = limit
        self.drafted = self.accepted = 0

    def learn(self, sequence: Sequence, most: int) -> None:
        """Set `limit` by what came of the guesses since the last call."""
        made, right = sequence.drafted - self.drafted, sequence.accepted - self.accepted
        if made:
            self.limit = min(most, 2 * self.limit if right == made else right + 1)
        self.drafted, self.accepted = sequence.drafted, sequence.accepted

    def after(self, tokens: list[int], count: int) -> list[int]:
        """`count` tokens that followed the longest known run that the tokens end with; over again where they end."""
        for end in range(self.known, len(tokens)):
            for size in self.sizes:
                if end >= size:
                    self.places[tuple(tokens[end - size : end])] = end
        self.known = len(tokens)
        for size in self.sizes:
            place = self.places.get(tuple(tokens[-size:])) if len(tokens) > size else None
            if place is not None:
                follow = tokens[place : place + count]
                return (follow * -(-count // len(follow)))[:count]
        return []
