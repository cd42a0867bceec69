"""What clients send: the bodies of the OpenAI interface, checked field by field.

A field with a meaning that the engine cannot fulfil, or that nobody knows, is refused rather than passed over, so
that an answer is never to another question. Fields that only describe the caller are accepted and not used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from layerwise.serve.request import MOST_LOGPROBS, Grammar, Params

MOST_CHOICES = 64
COLDEST = 1e-4
"""Temperatures below are 0: dividing logits by less leaves the range of float32."""


def _utf8(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("half of a surrogate pair is no character") from error
    return text


Text = Annotated[str, AfterValidator(_utf8)]
Token = Annotated[int, Field(ge=0, lt=1 << 31)]
Tokens = Annotated[list[Token], Field(fail_fast=True)]
Stop = Annotated[Text, Field(max_length=1024)]
TokenText = Annotated[str, Field(pattern="^[0-9]{1,9}$")]
Bias = Annotated[float, Field(ge=-100, le=100)]
Unused = Any
Absent = Annotated[list[Any], Field(max_length=0)]


class Body(BaseModel):
    """JSON types are not converted into one another: "5" is no number."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


def complaint(errors: Sequence[Mapping[str, Any]]) -> tuple[list[str], str]:
    """Where a body is wrong, and what is wrong there, from what pydantic found.

    Of the first error; where a field may have several forms, of the form that fits furthest.
    """
    base = _place(errors[0])
    near = [error for error in errors if _place(error)[: len(base)] == base]
    chosen = max(near, key=lambda error: len(_place(error)))
    kind, limits = chosen["type"], chosen.get("ctx", {})
    if kind == "extra_forbidden":
        return _place(chosen), "not a field that is known here"
    if kind == "too_long" and limits.get("max_length") == 0:
        return _place(chosen), "not supported here; leave it out"
    return _place(chosen), str(chosen["msg"]).removeprefix("Value error, ")


def _place(error: Mapping[str, Any]) -> list[str]:
    """Names and numbers on the way to a value, without pydantic's names of forms such as `list[Part]`."""
    parts = (str(part)[:100] for part in error["loc"] if part != "body")
    return [part for part in parts if not ("[" in part or part in ("str", "float", "int"))]


class StreamOptions(Body):
    """With `include_usage` a stream ends with a chunk that has no choices and all token counts."""

    include_usage: bool | None = None
    include_obfuscation: Unused = None


class JsonSchema(Body):
    """A schema that the answer must fulfil."""

    name: str = "answer"
    description: str | None = None
    schema_: dict[str, Any] = Field(default_factory=dict, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """`text`, any JSON object, or JSON by a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class Sampling(Body):
    """What both kinds of completion share. `top_k`, `min_p`, `repetition_penalty`, `ignore_eos` and `priority` are not
    OpenAI's: `ignore_eos` writes on after the end of text, a higher `priority` number waits longer.
    """

    model: str | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    logit_bias: Annotated[dict[TokenText, Bias], Field(max_length=1024)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    ignore_eos: bool | None = None
    priority: Annotated[int, Field(ge=0, le=100)] | None = None
    user: Unused = None
    metadata: Unused = None
    store: Unused = None
    service_tier: Unused = None
    safety_identifier: Unused = None
    prompt_cache_key: Unused = None
    prompt_cache_retention: Unused = None

    def params(self, max_tokens: int, stop_ids: tuple[int, ...], choice: int, grammar: Grammar | None,
               logprobs: int | None, stop: tuple[str, ...] = (), prompt_logprobs: bool = False) -> Params:
        """The engine's parameters of choice number `choice`, which has a seed of its own. Raises BadOption."""
        temperature = 1.0 if self.temperature is None else self.temperature
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return Params(
            max_tokens=max_tokens,
            temperature=temperature if temperature >= COLDEST else 0.0,
            top_p=1.0 if self.top_p is None else max(self.top_p, 1e-6),
            top_k=max(self.top_k or 0, 0),
            min_p=self.min_p or 0.0,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
            stop=(*(text for text in given if text), *stop),
            stop_ids=() if self.ignore_eos else stop_ids,
            seed=None if self.seed is None else self.seed + choice,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            logit_bias={int(token): bias for token, bias in (self.logit_bias or {}).items()},
            grammar=grammar,
        )

    @property
    def choices(self) -> int:
        """Answers to each prompt."""
        return self.n or 1

    @property
    def with_usage(self) -> bool:
        """Whether a stream tells token counts."""
        return bool(self.stream_options and self.stream_options.include_usage)


class CompletionBody(Sampling):
    """`POST /v1/completions`: text or token ids to continue, one prompt or several."""

    prompt: Text | Tokens | Annotated[list[Text], Field(max_length=256, fail_fast=True)] | Annotated[
        list[Tokens], Field(max_length=256, fail_fast=True)]
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    echo: bool | None = None
    best_of: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    suffix: Literal[""] | None = None

    def prompts(self) -> list[str | list[int]]:
        """Every prompt by itself."""
        given: list[Any] = [self.prompt] if isinstance(self.prompt, str) else list(self.prompt)
        return [given] if given and isinstance(given[0], int) else given


class Part(Body):
    """A piece of a message; only text is understood."""

    type: Literal["text"]
    text: Text


class Message(BaseModel):
    """One turn of a conversation. Whatever else a client keeps with it is not used."""

    model_config = ConfigDict(strict=True, extra="ignore")

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Text | list[Part] | None = None
    tool_calls: Absent | None = None

    def plain(self) -> dict[str, str]:
        """Role and text alone, as chat templates expect them."""
        role = "system" if self.role == "developer" else self.role
        content = self.content or ""
        return {"role": role, "content": content if isinstance(content, str) else "".join(p.text for p in content)}


class ChatBody(Sampling):
    """`POST /v1/chat/completions`: a conversation to answer."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=4096, fail_fast=True)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    tools: Absent | None = None
    functions: Absent | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: Unused = None
    modalities: list[Literal["text"]] | None = None
    reasoning_effort: Unused = None
    verbosity: Unused = None
