"""Many prompts from a file, answered offline: any order inside, the file's order outside, every line exactly once.

A line is OpenAI's batch form (`custom_id`, `url`, `body`) or the body of a completion itself, such as
`{"prompt": "...", "max_tokens": 20}` or `{"messages": [...]}`. Lines are worked on group by group of equal
beginnings, which meet in the prefix cache.

Each answer is appended to a file beside the output as soon as it is there, under an id that depends on the line, its
number, the model and the defaults. Whatever ends the run, the next one keeps the answers whose id it would give again
and works on the rest; at the end all are renamed into place.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from layerwise.errors import BadFile, LayerwiseError
from layerwise.io import atomic
from layerwise.serve import replies
from layerwise.serve.openai import ChatBody, CompletionBody, complaint
from layerwise.serve.render import Job, Renderer
from layerwise.serve.request import Completion

URLS: dict[str, type[ChatBody] | type[CompletionBody]] = {
    "/v1/chat/completions": ChatBody, "/v1/completions": CompletionBody}
UNSAID = 64
DEFAULTS = {"temperature": 0.0, "seed": 0}
"""What a line gets that says nothing: the likeliest tokens, the same every time."""


@dataclass(frozen=True)
class Line:
    """One line of the input: `number` counts from 1; `id` names its answer; `body` is None where `wrong` says why."""

    number: int
    id: str
    custom: str | None
    wrapped: bool
    body: ChatBody | CompletionBody | None
    wrong: str = ""

    @property
    def text(self) -> str:
        """What lines are grouped by."""
        if isinstance(self.body, ChatBody):
            return "\0".join(message.plain()["content"] for message in self.body.messages)
        return str(self.body.prompt) if self.body else ""

    @property
    def tokens(self) -> int:
        """Tokens that the line may write, or what most that do not say would."""
        longest = self.body.max_tokens if self.body else 0
        if isinstance(self.body, ChatBody):
            longest = self.body.max_completion_tokens or longest
        return UNSAID if longest is None else longest


def read(file: Path, settings: Mapping[str, Any]) -> list[Line]:
    """Every line that is not blank; wrong ones too. Raises BadFile where the file cannot be read or holds nothing.

    `settings` (model, defaults) belong to what the answers depend on.
    """
    try:
        given = file.read_bytes().split(b"\n")
    except OSError as error:
        raise BadFile(f"{file} cannot be read: {error.strerror}", expected="a file of JSON lines",
                      do='write one {"prompt": "..."} a line') from error
    known = json.dumps(settings, sort_keys=True).encode()
    lines = [_line(number, text, known, settings) for number, text in enumerate(given, 1) if text.strip()]
    if not lines:
        raise BadFile(f"{file} is empty", expected="a file of JSON lines", do='write one {"prompt": "..."} a line')
    return lines


def _line(number: int, text: bytes, known: bytes, settings: Mapping[str, Any]) -> Line:
    id = "line-" + hashlib.sha256(b"%d\0%s\0%s" % (number, known, text.strip())).hexdigest()[:24]
    custom, wrapped = None, False
    try:
        value = json.loads(text)
        if not isinstance(value, dict):
            raise ValueError(f"a {type(value).__name__} instead of an object")
        wrapped = "body" in value
        custom = value.pop("custom_id", None)
        if custom is not None and not isinstance(custom, str):
            raise ValueError("custom_id is no text")
        body = value.pop("body") if wrapped else value
        kind = _kind(value if wrapped else {}, body)
        made = kind.model_validate(DEFAULTS | dict(settings.get("defaults", {})) | body)
        return Line(number, id, custom, wrapped, made)
    except ValidationError as error:
        places, what = complaint(error.errors())
        return Line(number, id, None if not isinstance(custom, str) else custom, wrapped, None,
                    ": ".join(filter(None, [".".join(places), what])))
    except (ValueError, RecursionError) as error:
        return Line(number, id, None if not isinstance(custom, str) else custom, wrapped, None,
                    f"{type(error).__name__}: {error}" if isinstance(error, RecursionError) else str(error))


def _kind(wrapper: Mapping[str, Any], body: object) -> type[ChatBody] | type[CompletionBody]:
    if not isinstance(body, dict):
        raise ValueError("body is no object")
    if body.get("stream"):
        raise ValueError("stream: a file is answered whole")
    url = wrapper.get("url")
    if url is not None and url not in URLS:
        raise ValueError(f"url {url!r}; expected one of {', '.join(URLS)}")
    if url:
        return URLS[url]
    return ChatBody if "messages" in body else CompletionBody


@dataclass
class Results:
    """The answers of a run that may have begun before: `done` by id, kept beside `output` until all are there."""

    output: Path
    done: dict[str, str] = field(default_factory=dict)

    @property
    def partial(self) -> Path:
        """Where answers are kept on the way."""
        return self.output.with_name(f".{self.output.name}.partial")

    def resume(self, lines: Iterable[Line]) -> None:
        """Find the answers that earlier runs gave to these lines. Raises BadFile for an output of something else."""
        wanted = {line.id for line in lines}
        found = {**_answers(self.output), **_answers(self.partial)}
        self.done = {id: text for id, text in found.items() if id in wanted}
        if self.output.exists() and self.output.stat().st_size and not self.done:
            raise BadFile(f"{self.output} holds other results", expected="a new file, or results of the same input",
                          do="choose another --output, or remove it")
        self.partial.parent.mkdir(parents=True, exist_ok=True)
        if self.partial.exists():
            atomic.write_text(self.partial, "".join(text + "\n" for text in self.done.values()))

    def add(self, id: str, answer: Mapping[str, Any]) -> None:
        """Keep one more answer; it is on its way to the disk when this returns."""
        text = json.dumps(answer, ensure_ascii=False, allow_nan=False)
        with self.partial.open("a", encoding="utf-8") as file:
            file.write(text + "\n")
        self.done[id] = text

    def finish(self, lines: Iterable[Line]) -> None:
        """Put all answers in place, in the order of the lines."""
        text = "".join(self.done[line.id] + "\n" for line in lines)
        if not self.output.exists() or self.output.read_text(encoding="utf-8") != text:
            atomic.write_text(self.output, text)
        self.partial.unlink(missing_ok=True)


def _answers(file: Path) -> dict[str, str]:
    """Whole lines of an earlier run by id; what was cut off by its end is left out."""
    found = {}
    for text in (file.read_bytes().split(b"\n") if file.exists() else []):
        try:
            value = json.loads(text)
            found[value["id"]] = text.decode()
        except (ValueError, TypeError, KeyError):
            continue
    return found


def answer(line: Line, job: Job, completions: list[Completion]) -> dict[str, Any]:
    """What the output says of a line: OpenAI's form where the line had it, else text, reason and token counts."""
    whole = Renderer(job).whole(completions).model_dump(mode="json")
    if line.wrapped:
        return {"id": line.id, "custom_id": line.custom, "line": line.number, "error": None,
                "response": {"status_code": 200, "request_id": line.id, "body": whole}}
    extra = {} if line.custom is None else {"custom_id": line.custom}
    shared = {"id": line.id, "line": line.number, **extra}
    if len(completions) > 1 or job.logprobs is not None:
        return {**shared, "choices": whole["choices"], "usage": whole["usage"]}
    [only] = completions
    return {**shared, "text": only.text, "finish_reason": only.finish, "usage": whole["usage"]}


def failure(line: Line, why: str) -> dict[str, Any]:
    """What the output says of a line that is wrong."""
    body = replies.error(f"line {line.number}: {why}")
    extra = {} if line.custom is None else {"custom_id": line.custom}
    if line.wrapped:
        extra["response"] = None  # type: ignore[assignment]
    return {"id": line.id, "line": line.number, **extra, **body}


def explain(error: LayerwiseError) -> str:
    """An error in one line."""
    return f"{error.given}; expected {error.expected}; {error.do}"


class Flush:
    """Asks for the disk now and then: what was added survives a crash of the machine except for the last seconds."""

    def __init__(self, file: Path, seconds: float = 5.0, clock: Callable[[], float] = time.monotonic) -> None:
        self.file, self.seconds, self.clock, self.last = file, seconds, clock, clock()

    def __call__(self) -> None:
        """Call after adding."""
        if self.clock() - self.last >= self.seconds and self.file.exists():
            with self.file.open("rb") as file:
                os.fsync(file.fileno())
            self.last = self.clock()
