"""What goes into the engine and what comes out: parameters, requests, events, completions.

A request is token ids and parameters; the engine answers with events, one per step in which the request got new
tokens, the last of which says why it ended and what it used. `Completion` is all events of one request together.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from torch import Tensor

from layerwise.errors import BadData, BadOption, LayerwiseError

Finish = Literal["stop", "length", "cancelled", "error"]
"""`stop`: a stop token, a stop string or the end of the grammar; `length`: `max_tokens` or the context is full."""

MOST_LOGPROBS = 20

_numbers = itertools.count()


class QueueFull(LayerwiseError):
    """The engine holds as many waiting requests as it may; try again later."""


class TooLong(BadData):
    """A prompt that does not fit into the context or the cache; `tokens` were given, `limit` are possible."""

    def __init__(self, tokens: int, limit: int, what: str) -> None:
        self.tokens, self.limit = tokens, limit
        super().__init__(f"a prompt of {tokens} tokens", expected=f"at most {limit}, {what}", do="shorten the prompt")


class Grammar(Protocol):
    """What constrains a request's tokens, such as a JSON schema; it is asked token by token, in order."""

    def mask(self, logits_V: Tensor) -> None:
        """Set the logits of tokens that may not come next to minus infinity, in place."""

    def accept(self, token: int) -> bool:
        """Take note of a token; True where nothing may follow, which ends the request with `stop`."""


def _check(name: str, value: object, good: bool, expected: str) -> None:
    if not good:
        raise BadOption(f"{name}={value!r}", expected=expected, do="change it or leave it out")


@dataclass(frozen=True)
class Params:
    """How a request is continued. Raises BadOption for a value outside its range.

    `temperature` 0 takes the likeliest token. `top_k` 0, `top_p` 1 and `min_p` 0 keep all tokens. `stop` are
    strings before which the text ends, `stop_ids` tokens that end it (None: the tokenizer's end of text; empty:
    none). `seed` None draws one. `logprobs` None gives none, n gives those of each token and of the n likeliest.
    `prompt_logprobs` also scores the prompt; only then may `max_tokens` be 0. `grammar` belongs to one request.
    """

    max_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] | None = None
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: bool = False
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    grammar: Grammar | None = None

    def __post_init__(self) -> None:
        least = 0 if self.prompt_logprobs else 1
        _check("max_tokens", self.max_tokens, least <= self.max_tokens, f"{least} or more")
        _check("temperature", self.temperature, 0 <= self.temperature < math.inf, "0 or more")
        _check("top_p", self.top_p, 0 < self.top_p <= 1, "above 0, up to 1")
        _check("top_k", self.top_k, self.top_k >= 0, "0 (all) or more")
        _check("min_p", self.min_p, 0 <= self.min_p <= 1, "between 0 and 1")
        for name in ("presence_penalty", "frequency_penalty"):
            _check(name, getattr(self, name), math.isfinite(getattr(self, name)), "a finite number")
        _check("repetition_penalty", self.repetition_penalty, 0 < self.repetition_penalty < math.inf, "above 0")
        _check("stop", self.stop, all(self.stop), "strings that are not empty")
        _check("logprobs", self.logprobs, self.logprobs is None or 0 <= self.logprobs <= MOST_LOGPROBS,
               f"None, or 0 to {MOST_LOGPROBS}")
        for token, bias in self.logit_bias.items():
            _check("logit_bias", {token: bias}, token >= 0 and not math.isnan(bias), "token ids to numbers")

    @property
    def plain(self) -> bool:
        """Whether the likeliest token of the unchanged logits is what is asked for."""
        return (self.temperature == 0 and not self.logit_bias and self.grammar is None
                and self.presence_penalty == self.frequency_penalty == 0 and self.repetition_penalty == 1)


@dataclass(frozen=True)
class Request:
    """A prompt (token ids) to be continued. Of two requests, the one with the lower `priority` number goes first."""

    prompt: tuple[int, ...]
    params: Params = Params()
    priority: int = 0
    id: str = field(default_factory=lambda: f"request-{next(_numbers)}")


@dataclass(frozen=True)
class TokenLogprob:
    """Natural logarithm of a token's probability before temperature and filters; the likeliest ones beside it."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Usage:
    """Tokens of a request: its prompt, those of it that a cached prefix spared, and what was written.

    `drafted` and `accepted` count speculated tokens.
    """

    prompt: int
    cached: int
    completion: int
    drafted: int = 0
    accepted: int = 0


@dataclass(frozen=True)
class Event:
    """News of one request: new tokens, the text that is now safe to show, and at the end `finish` and `usage`.

    A stop token is among `tokens`, not in `text`. `prompt_logprobs` come with the first event, one for each prompt
    token after the first.
    """

    id: str
    tokens: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    finish: Finish | None = None
    usage: Usage | None = None
    error: str | None = None


@dataclass(frozen=True)
class Completion:
    """A request from its beginning to its end."""

    id: str
    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    text: str
    finish: Finish
    usage: Usage
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()

    @staticmethod
    def of(request: Request, events: Sequence[Event]) -> Completion:
        """All `events` of `request`, of which the last ends it."""
        last = events[-1]
        assert last.finish is not None and last.usage is not None
        return Completion(
            request.id, request.prompt, tuple(token for event in events for token in event.tokens),
            "".join(event.text for event in events), last.finish, last.usage,
            tuple(item for event in events for item in event.logprobs),
            tuple(item for event in events for item in event.prompt_logprobs))
