"""From the body of an HTTP request, or a line of a file, to requests of the engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from layerwise.errors import BadData, BadOption
from layerwise.serve import conversation
from layerwise.serve.engine import Engine
from layerwise.serve.grammar import Grammars
from layerwise.serve.openai import ChatBody, CompletionBody, ResponseFormat, Sampling
from layerwise.serve.render import Job
from layerwise.serve.request import Grammar, Request, TooLong

MOST_ANSWERS = 256
"""Answers that one body may ask for: prompts times n."""


class Jobs:
    """Makes jobs for an engine whose model clients call `name`; `prompt` limits prompts below what the engine takes."""

    def __init__(self, engine: Engine, name: str, prompt: int | None = None) -> None:
        self.engine, self.name, self.prompt = engine, name, prompt
        self.stack = engine.stack
        self.stops = conversation.stop_ids(self.stack)
        tokenizer = self.stack.tokenizer
        self._grammars = Grammars(tokenizer, self.stack.spec.vocabulary, self.stops) if tokenizer else None

    @property
    def longest(self) -> int:
        """Tokens that a prompt may have."""
        return min(self.prompt or self.engine.longest, self.engine.longest)

    def make(self, body: CompletionBody | ChatBody) -> Job:
        """What a body asks for. Not safe for threads where it has a grammar.

        Raises TooLong for a prompt, BadData for messages or a schema that cannot be used, BadOption for options that
        do not fit together.
        """
        return self._chat(body) if isinstance(body, ChatBody) else self._texts(body)

    def _texts(self, body: CompletionBody) -> Job:
        prompts = body.prompts()
        if not prompts:
            raise BadData("no prompt", expected="at least one", do="write something to continue")
        if len(prompts) * body.choices > MOST_ANSWERS:
            raise BadOption(f"{len(prompts)} prompts with {body.choices} answers each",
                            expected=f"at most {MOST_ANSWERS} answers to one request", do="send them in parts")
        if body.best_of not in (None, body.choices):
            raise BadOption(f"best_of={body.best_of} with n={body.choices}", expected="both equal",
                            do="ask for n answers and choose among them")
        limit = 16 if body.max_tokens is None else body.max_tokens
        scored = bool(body.echo) and (body.logprobs is not None or limit == 0)
        grammar = self._grammar(body.response_format)
        requests: list[Request] = []
        echo: list[str] = []
        for prompt in prompts:
            ids = self._cut(prompt, special=True) if isinstance(prompt, str) else tuple(prompt)
            self._check(ids)
            for choice in range(body.choices):
                params = body.params(limit, self.stops, choice, grammar and grammar(), body.logprobs,
                                     prompt_logprobs=scored)
                requests.append(Request(ids, params, body.priority or 0))
                echo.append(prompt if isinstance(prompt, str) else self._spell(ids))
        return self._job("text", body, requests, body.logprobs, echo if body.echo else None)

    def _chat(self, body: ChatBody) -> Job:
        tokenizer = conversation.tokenizer_of(self.stack)
        messages = [message.plain() for message in body.messages]
        text, special, stop = conversation.prompt(tokenizer, messages)
        ids = self._cut(text, special)
        self._check(ids)
        limit = body.max_completion_tokens or body.max_tokens or self.engine.longest
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        grammar = self._grammar(body.response_format)
        requests = [Request(ids, body.params(limit, self.stops, choice, grammar and grammar(), logprobs, stop),
                            body.priority or 0) for choice in range(body.choices)]
        return self._job("chat", body, requests, logprobs, None)

    def _job(self, kind: str, body: Sampling, requests: list[Request], logprobs: int | None,
             echo: list[str] | None) -> Job:
        return Job(kind, self.name, requests, body.choices, frozenset(self.stops), self._spell, bool(body.stream),
                   body.with_usage, logprobs, echo)

    def _spell(self, ids: Sequence[int]) -> str:
        return self.stack.tokenizer.decode(ids) if self.stack.tokenizer else ""

    def _cut(self, text: str, special: bool) -> tuple[int, ...]:
        return tuple(conversation.tokenizer_of(self.stack).encode(text, special=special))

    def _check(self, ids: Sequence[int]) -> None:
        if len(ids) > self.longest:
            raise TooLong(len(ids), self.longest, f"what {self.name} is served with")

    def _grammar(self, wanted: ResponseFormat | None) -> Callable[[], Grammar] | None:
        if wanted is None or wanted.type == "text":
            return None
        if wanted.type == "json_schema" and wanted.json_schema is None:
            raise BadOption("response_format without json_schema", expected='{"json_schema": {"schema": ...}}',
                            do="give the schema")
        schema = wanted.json_schema.schema_ if wanted.json_schema else {"type": "object"}
        if self._grammars is None:
            raise BadOption(f"JSON from {self.name}, which has no tokenizer", expected="a model with a tokenizer",
                            do="leave response_format out")
        return self._grammars.compile(schema)
