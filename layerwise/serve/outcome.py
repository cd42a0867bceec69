"""What comes of one request: which drawn tokens it takes, where it ends, and the events that tell."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from layerwise.generate.text import Decodes
from layerwise.serve.request import Event, Finish, TokenLogprob, Usage
from layerwise.serve.sequence import Sequence as Running
from layerwise.serve.text import Writer


class Outcome:
    """Collects tokens, text and scores of `sequence` until `event` hands them out; `finish` says why it ended."""

    def __init__(self, sequence: Running, stops: Collection[int], tokenizer: Decodes | None) -> None:
        self.sequence, self.stops = sequence, stops
        self.writer = Writer(tokenizer, sequence.request.params.stop)
        self.finish: Finish | None = None
        self.logprobs: list[TokenLogprob] = []
        self._tokens: list[int] = []
        self._text: list[str] = []
        self._scores: list[TokenLogprob] = []
        self._scored = 0
        self._told = 0

    def take(self, drawn: Sequence[int]) -> list[int]:
        """As many of the tokens as belong to the request; sets `finish` where it ends with them."""
        taken: list[int] = []
        for token in drawn:
            if self.sequence.left <= len(taken):
                break
            taken.append(token)
            self._judge(token)
            if self.finish:
                break
        if self.finish is None and self.sequence.left <= len(taken):
            self.finish = "length"
        if self.finish:
            self._text.append(self.writer.end())
        self._tokens += taken
        return taken

    def _judge(self, token: int) -> None:
        if token in self.stops:
            self.finish = "stop"
            return
        self._text.append(self.writer.add(token))
        grammar = self.sequence.request.params.grammar
        if self.writer.stopped or (grammar is not None and grammar.accept(token)):
            self.finish = "stop"

    def score(self, start: int, scores: Sequence[TokenLogprob]) -> None:
        """Log-probabilities of the prompt tokens after position `start`; those known already are passed over."""
        new = scores[max(0, self._scored - start) :]
        self._scores += new
        self._scored += len(new)

    def event(self) -> Event:
        """What is new since the last event."""
        event = Event(
            self.sequence.id, tuple(self._tokens), "".join(self._text), tuple(self.logprobs), tuple(self._scores),
            self.finish, self._usage() if self.finish else None)
        self._told += len(self._tokens)
        self._tokens, self._text, self.logprobs, self._scores = [], [], [], []
        return event

    def ended(self, finish: Finish, error: str | None = None) -> Event:
        """The last event of a request that did not end by itself."""
        self.finish = finish
        return Event(self.sequence.id, finish=finish, usage=self._usage(), error=error)

    def _usage(self) -> Usage:
        sequence = self.sequence
        return Usage(sequence.prompt, sequence.cached, self._told + len(self._tokens), sequence.drafted,
                     sequence.accepted)
