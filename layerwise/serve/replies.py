"""What clients get: the answers of the OpenAI interface, whole or chunk by chunk, and errors in its form."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

from layerwise.serve.request import Usage


class Model(BaseModel):
    """A model that is served; `max_model_len` are the tokens of a prompt and its answer together."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "layerwise"
    max_model_len: int


class Models(BaseModel):
    """All models that are served."""

    object: Literal["list"] = "list"
    data: list[Model]


class Cached(BaseModel):
    """Prompt tokens that a cached prefix spared."""

    cached_tokens: int


class Tokens(BaseModel):
    """What was read and written."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: Cached

    @staticmethod
    def of(usages: list[Usage], choices: int) -> Tokens:
        """Totals; each prompt is counted once, however many `choices` answer it."""
        read = sum(usage.prompt for usage in usages[::choices])
        written = sum(usage.completion for usage in usages)
        cached = sum(usage.cached for usage in usages[::choices])
        return Tokens(prompt_tokens=read, completion_tokens=written, total_tokens=read + written,
                      prompt_tokens_details=Cached(cached_tokens=cached))


class TopLogprob(BaseModel):
    """A token that might have come, and how likely it was; `bytes` is null where it is part of a character."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    """A token that came."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """Tokens of an answer with their log-probabilities."""

    content: list[TokenLogprob]


class TextLogprobs(BaseModel):
    """The older form: parallel lists, with null for the first token of an echoed prompt."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class Answer(BaseModel):
    """A message by the model."""

    role: Literal["assistant"] = "assistant"
    content: str


class ChatChoice(BaseModel):
    """One answer of several."""

    index: int
    message: Answer
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None


class ChatPiece(BaseModel):
    """The next piece of one answer; `delta` has its role, the next text, or nothing at the end."""

    index: int
    delta: dict[str, str]
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None


class TextChoice(BaseModel):
    """One continuation of several, whole or a piece of it."""

    index: int
    text: str
    logprobs: TextLogprobs | None = None
    finish_reason: str | None = None


class Reply(BaseModel):
    """What all answers begin with."""

    id: str
    created: int
    model: str
    usage: Tokens | None = None


class Chat(Reply):
    """The answer to `POST /v1/chat/completions`."""

    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]


class ChatChunk(Reply):
    """A piece of a streamed chat."""

    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[ChatPiece]


class Text(Reply):
    """The answer to `POST /v1/completions`, and also its pieces when streamed."""

    object: Literal["text_completion"] = "text_completion"
    choices: list[TextChoice]


class Problem(BaseModel):
    """What is wrong with a request."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorReply(BaseModel):
    """Every answer with a status of 400 or above."""

    error: Problem


def error(message: str, kind: str = "invalid_request_error", param: str | None = None,
          code: str | None = None) -> dict[str, Any]:
    """The body of an error; what UTF-8 cannot write is replaced."""
    clean = message.encode("utf-8", "replace").decode()
    where = param and param.encode("utf-8", "replace").decode()
    return ErrorReply(error=Problem(message=clean, type=kind, param=where, code=code)).model_dump()
