"""Events of the engine as answers of the OpenAI interface, whole or chunk by chunk."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from pydantic import BaseModel

from layerwise.serve import replies
from layerwise.serve.request import Completion, Event, Request, TokenLogprob, Usage

Spell = Callable[[Sequence[int]], str]


@dataclass
class Job:
    """What one HTTP request asks of the engine: `choices` requests for each prompt, and how to answer.

    `stops` are tokens that end a text and are not shown. `echo` holds, for each request, the prompt's text where the
    answer repeats it. `logprobs` is how many likely tokens to show beside each, None for no log-probabilities.
    """

    kind: str
    model: str
    requests: list[Request]
    choices: int
    stops: frozenset[int]
    spell: Spell
    stream: bool
    usage: bool
    logprobs: int | None = None
    echo: list[str] | None = None
    created: int = field(default_factory=lambda: int(time.time()))
    id: str = ""

    def __post_init__(self) -> None:
        self.id = f"{'chatcmpl' if self.kind == 'chat' else 'cmpl'}-{secrets.token_hex(12)}"

    @property
    def chat(self) -> bool:
        return self.kind == "chat"


class Renderer:
    """Writes the answer to one job; it keeps what the next chunk depends on."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self._begun: set[int] = set()
        self._offsets = [0] * len(job.requests)
        self._usages: list[Usage] = [Usage(len(request.prompt), 0, 0) for request in job.requests]

    # whole ---------------------------------------------------------------------------------------

    def whole(self, completions: Sequence[Completion]) -> BaseModel:
        """The answer, when every request has ended."""
        job = self.job
        tokens = replies.Tokens.of([completion.usage for completion in completions], job.choices)
        if job.chat:
            chosen = [replies.ChatChoice(index=index, message=replies.Answer(content=completion.text),
                                         logprobs=self._chat_logprobs(completion), finish_reason=completion.finish)
                      for index, completion in enumerate(completions)]
            return replies.Chat(id=job.id, created=job.created, model=job.model, choices=chosen, usage=tokens)
        texts = [replies.TextChoice(index=index, text=self._echoed(index) + completion.text,
                                    logprobs=self._text_logprobs(index, completion), finish_reason=completion.finish)
                 for index, completion in enumerate(completions)]
        return replies.Text(id=job.id, created=job.created, model=job.model, choices=texts, usage=tokens)

    # chunks --------------------------------------------------------------------------------------

    def chunks(self, index: int, event: Event) -> list[BaseModel]:
        """What an event of request number `index` adds to the stream."""
        if event.usage is not None:
            self._usages[index] = event.usage
        first = index not in self._begun
        self._begun.add(index)
        return self._chat_chunks(index, event, first) if self.job.chat else self._text_chunks(index, event, first)

    def last(self) -> list[BaseModel]:
        """The chunk of token counts, where asked for."""
        if not self.job.usage:
            return []
        tokens = replies.Tokens.of(self._usages, self.job.choices)
        made = replies.ChatChunk if self.job.chat else replies.Text
        return [made(id=self.job.id, created=self.job.created, model=self.job.model, choices=[], usage=tokens)]

    def _chat_chunks(self, index: int, event: Event, first: bool) -> list[BaseModel]:
        pieces = []
        logprobs = self._chat_logprobs(event)
        if first:
            pieces.append(replies.ChatPiece(index=index, delta={"role": "assistant", "content": ""}))
        if event.text or (logprobs and logprobs.content):
            pieces.append(replies.ChatPiece(index=index, delta={"content": event.text}, logprobs=logprobs))
        if event.finish:
            pieces.append(replies.ChatPiece(index=index, delta={}, finish_reason=event.finish))
        job = self.job
        return [replies.ChatChunk(id=job.id, created=job.created, model=job.model, choices=[piece])
                for piece in pieces]

    def _text_chunks(self, index: int, event: Event, first: bool) -> list[BaseModel]:
        text = (self._echoed(index) if first else "") + event.text
        logprobs = self._text_logprobs(index, event)
        if not text and not event.finish and not (logprobs and logprobs.tokens):
            return []
        choice = replies.TextChoice(index=index, text=text, logprobs=logprobs, finish_reason=event.finish)
        return [replies.Text(id=self.job.id, created=self.job.created, model=self.job.model, choices=[choice])]

    # parts ---------------------------------------------------------------------------------------

    def _echoed(self, index: int) -> str:
        return self.job.echo[index] if self.job.echo else ""

    def _shown(self, given: Event | Completion) -> Sequence[TokenLogprob]:
        """Without the token that ended the text."""
        ended = given.finish == "stop" and given.logprobs and given.logprobs[-1].token in self.job.stops
        return given.logprobs[:-1] if ended else given.logprobs

    def _chat_logprobs(self, given: Event | Completion) -> replies.ChatLogprobs | None:
        if self.job.logprobs is None:
            return None
        return replies.ChatLogprobs(content=[
            replies.TokenLogprob(**self._entry(item.token, item.logprob).model_dump(),
                                 top_logprobs=[self._entry(token, value) for token, value in item.top])
            for item in self._shown(given)])

    def _entry(self, token: int, logprob: float) -> replies.TopLogprob:
        text = self.job.spell([token])
        whole = "\ufffd" not in text
        return replies.TopLogprob(token=text, logprob=finite(logprob), bytes=list(text.encode()) if whole else None)

    def _text_logprobs(self, index: int, given: Event | Completion) -> replies.TextLogprobs | None:
        if self.job.logprobs is None:
            return None
        made = replies.TextLogprobs(tokens=[], token_logprobs=[], text_offset=[],
                                    top_logprobs=[] if self.job.logprobs else None)
        if self.job.echo and self._offsets[index] == 0:
            self._add(made, index, self.job.requests[index].prompt[0], None, ())
            for item in given.prompt_logprobs:
                self._add(made, index, item.token, item.logprob, item.top)
        for item in self._shown(given):
            self._add(made, index, item.token, item.logprob, item.top)
        return made

    def _add(self, made: replies.TextLogprobs, index: int, token: int, logprob: float | None,
             top: Sequence[tuple[int, float]]) -> None:
        text = self.job.spell([token])
        made.tokens.append(text)
        made.token_logprobs.append(None if logprob is None else finite(logprob))
        if made.top_logprobs is not None:
            likely = {self.job.spell([other]): finite(value) for other, value in top}
            made.top_logprobs.append(None if logprob is None else likely)
        made.text_offset.append(self._offsets[index])
        self._offsets[index] += len(text)


def finite(logprob: float) -> float:
    """JSON knows no infinity: a token that cannot come gets -9999, as OpenAI writes it."""
    return max(logprob, -9999.0)
