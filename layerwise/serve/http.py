"""The HTTP interface: OpenAI's models, completions and chat, health, metrics, and a page to look at.

`application` makes an ASGI application from a `Service`; errors of users are answers with a status below 500.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from contextlib import aclosing
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from fastapi.routing import APIRoute
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from layerwise.errors import LayerwiseError, UnknownName
from layerwise.serve import prometheus, replies
from layerwise.serve.guard import Guard
from layerwise.serve.openai import ChatBody, CompletionBody, Message, complaint
from layerwise.serve.render import Renderer
from layerwise.serve.request import Event, QueueFull, TooLong
from layerwise.serve.service import INLINE, Refused, Service

PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"model": replies.ErrorReply} for status in (400, 401, 403, 404, 408, 413, 429)}
PAGE = Path(__file__).parent / "page.html"


class EventStream(StreamingResponse):
    """Server-sent events; what makes them is closed when the last is sent, or when nobody listens any more."""

    def __init__(self, pieces: AsyncIterator[str]) -> None:
        super().__init__(pieces, media_type="text/event-stream", headers={"Cache-Control": "no-store"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self.body_iterator):  # type: ignore[type-var]
            await self.stream_response(send)


def application(service: Service, key: str | None = None) -> Guard:
    """The ASGI application. With `key`, everything but `/` and `/health` needs it as a bearer token."""
    app = FastAPI(title="layerwise", version=version("layerwise"), docs_url=None, redoc_url=None)
    guard = Guard(app, body=service.bounds.body, seconds=service.bounds.seconds + 60, key=key)
    _add_answers(app, service)
    _add_views(app, service, guard)
    _add_errors(app, service)
    return guard


def _add_answers(app: FastAPI, service: Service) -> None:
    @app.post("/v1/completions", response_model=replies.Text, responses=PROBLEMS)
    async def completions(request: Request, body: CompletionBody) -> Response:
        """Continue prompts."""
        return await _answer(service, body, request)

    @app.post("/v1/chat/completions", response_model=replies.Chat, responses=PROBLEMS)
    async def chat(request: Request, body: ChatBody) -> Response:
        """Answer a conversation."""
        return await _answer(service, body, request)

    @app.get("/v1/stream", responses=PROBLEMS)
    async def stream(
        request: Request, prompt: Annotated[str, Query(max_length=32_768)],
        max_tokens: Annotated[int, Query(ge=1)] = 256, temperature: Annotated[float, Query(ge=0, le=2)] = 0.0,
        seed: Annotated[int, Query(ge=0, lt=1 << 63)] = 0, raw: bool = False,
    ) -> Response:
        """Answer one question (or, `raw`, continue a text) as a stream that a browser's EventSource reads."""
        if request.headers.get("sec-fetch-site") == "cross-site":
            raise HTTPException(403, "a page of another site")
        shared: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed, "stream": True}
        if raw:
            return await _answer(service, CompletionBody(prompt=prompt, **shared), request)
        messages = [Message(role="user", content=prompt)]
        return await _answer(service, ChatBody(messages=messages, **shared), request)

    @app.get("/v1/models", response_model=replies.Models, responses=PROBLEMS)
    async def models() -> Response:
        """The model that is served."""
        return _json(replies.Models(data=[_model(service)]))

    @app.get("/v1/models/{name:path}", response_model=replies.Model, responses=PROBLEMS)
    async def model(name: str) -> Response:
        """The model, by its name."""
        _known(name, service)
        return _json(_model(service))


def _add_views(app: FastAPI, service: Service, guard: Guard) -> None:
    @app.get("/health")
    async def health() -> dict[str, str]:
        """Whether requests are taken."""
        return {"status": "stopping" if service.stopping else "ok"}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> str:
        """Counters and gauges for Prometheus."""
        return prometheus.text(service, guard.statuses)

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def page() -> str:
        return PAGE.read_text(encoding="utf-8")


def _add_errors(app: FastAPI, service: Service) -> None:
    offered = [f"{method} {route.path}" for route in app.routes if isinstance(route, APIRoute)
               for method in sorted(route.methods or ()) if route.include_in_schema]

    async def wrong_fields(_: Request, found: Exception) -> Response:
        assert isinstance(found, RequestValidationError | ValidationError)
        places, what = complaint(found.errors())
        message = f"{'.'.join(places)}: {what}" if places else what
        return JSONResponse(replies.error(message, param=places[0] if places else None, code="invalid_value"), 400)

    async def wrong_route(request: Request, found: Exception) -> Response:
        assert isinstance(found, HTTPException)
        message = str(found.detail)
        if found.status_code in (404, 405):
            message = f"no {request.method} {request.url.path[:100]} here; expected {', '.join(offered)}"
        return JSONResponse(replies.error(message), found.status_code, headers=found.headers)

    async def given(_: Request, found: Exception) -> Response:
        assert isinstance(found, LayerwiseError)
        status, body = problem(found, service)
        hint = {"Retry-After": str(_wait(service))} if status in (429, 503) else None
        return JSONResponse(body, status, headers=hint)

    async def failed(_: Request, found: Exception) -> Response:
        return JSONResponse(replies.error(f"{type(found).__name__} in the server", "server_error"), 500)

    for kind, handler in ((RequestValidationError, wrong_fields), (ValidationError, wrong_fields),
                          (HTTPException, wrong_route), (LayerwiseError, given), (Exception, failed)):
        app.add_exception_handler(kind, handler)


def problem(found: LayerwiseError, service: Service) -> tuple[int, dict[str, Any]]:
    """Status and body of an error."""
    text = f"{found.given}; expected {found.expected}; {found.do}"
    if isinstance(found, QueueFull):
        return 429, replies.error(text, "rate_limit_error", code="queue_full")
    if service.stopping:
        return 503, replies.error("the server is stopping", "server_error", code="stopping")
    if isinstance(found, Refused) and found.fault == "server":
        return 500, replies.error(found.given, "server_error")
    if isinstance(found, UnknownName):
        return 404, replies.error(text, param="model", code="model_not_found")
    if isinstance(found, TooLong):
        return 400, replies.error(text, code="context_length_exceeded")
    return 400, replies.error(text)


def _wait(service: Service) -> int:
    """Seconds after which another try is worth it: about when a request of those running has ended."""
    return min(60, max(1, math.ceil(service.answered.mean)))


def _known(model: str | None, service: Service) -> None:
    if model is not None and model != service.name:
        raise UnknownName("served model", model[:200], [service.name])


def _model(service: Service) -> replies.Model:
    return replies.Model(id=service.name, created=service.started, max_model_len=service.jobs.engine.longest)


def _json(value: Any) -> Response:
    return Response(value.model_dump_json(), media_type="application/json")


async def _answer(service: Service, body: CompletionBody | ChatBody, request: Request) -> Response:
    """The answer to a body; errors before its first token still have a status of their own."""
    _known(body.model, service)
    size = int(request.headers.get("content-length", INLINE + 1)) or len(request.url.query)
    job = await service.job(body, size)
    renderer = Renderer(job)
    if not job.stream:
        return _json(renderer.whole(await service.whole(job)))
    events = service.events(job)
    return EventStream(_pieces(service, renderer, await anext(events), events))


async def _pieces(service: Service, renderer: Renderer, first: tuple[int, Event],
                  rest: AsyncIterator[tuple[int, Event]]) -> AsyncIterator[str]:
    async with aclosing(rest):  # type: ignore[type-var]
        yield _written(renderer.chunks(*first))
        try:
            async for index, event in rest:
                pieces = renderer.chunks(index, event)
                if pieces:
                    yield _written(pieces)
        except LayerwiseError as found:
            yield f"data: {JSONResponse(problem(found, service)[1]).body.decode()}\n\n"  # type: ignore[union-attr]
            return
        yield _written(renderer.last()) + "data: [DONE]\n\n"


def _written(pieces: list[Any]) -> str:
    return "".join(f"data: {piece.model_dump_json()}\n\n" for piece in pieces)
