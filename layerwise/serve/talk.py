"""One conversation with one engine; what was said before is in the prefix cache."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace

from layerwise.errors import BadOption
from layerwise.serve import conversation
from layerwise.serve.engine import Engine
from layerwise.serve.request import Params, Request, TooLong


class Talk:
    """Keeps `messages`. `forgotten` counts turns that the last answer could not see, `written` its tokens."""

    def __init__(self, engine: Engine, params: Params, system: str | None = None) -> None:
        self.engine, self.system = engine, system
        self.tokenizer = conversation.tokenizer_of(engine.stack)
        self.params = replace(params, stop_ids=conversation.stop_ids(engine.stack))
        self.forgotten = self.written = 0
        self.messages: list[dict[str, str]] = []
        self.clear()

    def clear(self) -> None:
        """Begin anew."""
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def say(self, text: str) -> Generator[str]:
        """The answer, one piece a step, some empty; closing the generator ends it where it is.

        The oldest turns are left out where all of them no longer fit. Raises TooLong where the last alone does not,
        BadOption where the engine fails.
        """
        self.messages.append({"role": "user", "content": text})
        try:
            request = self._request()
        except TooLong:
            self.messages.pop()
            raise
        pieces: list[str] = []
        self.written = 0
        self.engine.add(request)
        try:
            while self.engine.busy:
                shown = len(pieces)
                for event in self.engine.step():
                    if event.finish == "error":
                        raise BadOption(f"an answer that failed: {event.error}", expected="an answer", do="ask again")
                    self.written += len(event.tokens)
                    pieces.append(event.text)
                yield "".join(pieces[shown:])
        finally:
            if self.engine.busy:
                self.engine.cancel(request.id)
                self.engine.step()
            self.messages.append({"role": "assistant", "content": "".join(pieces)})

    def _request(self) -> Request:
        """The prompt with as many turns as leave room for an answer."""
        first = 1 if self.system else 0
        self.forgotten = 0
        room = min(self.params.max_tokens, self.engine.longest // 4)
        while True:
            seen = self.messages[:first] + self.messages[first + self.forgotten :]
            text, special, stop = conversation.prompt(self.tokenizer, seen)
            ids = tuple(self.tokenizer.encode(text, special=special))
            if len(ids) <= self.engine.longest - room:
                return Request(ids, replace(self.params, stop=stop))
            if len(seen) - first <= 1:
                raise TooLong(len(ids), self.engine.longest - room, "so that an answer fits as well")
            self.forgotten += 2
