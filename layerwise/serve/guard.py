"""What stands before the application: the key, the size of bodies, time, and clients that go away."""

from __future__ import annotations

import asyncio
import hmac
import json
from collections import Counter
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from layerwise.serve.replies import error

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

OPEN = ("/", "/health")
"""Paths that need no key."""

DRAINED = 16
"""A body this many times too large is still read, so that its sender sees the answer."""


class Guard:
    """An ASGI application around another.

    Bodies are read whole, up to `body` bytes within `patience` seconds, before the inner application sees a request.
    It is cancelled when its client goes away, or after `seconds` (a client that takes no bytes). `statuses` counts
    answers by status; 499 is a client that left first.
    """

    def __init__(self, app: App, *, body: int, seconds: float, key: str | None = None, patience: float = 30.0) -> None:
        self.app, self.body, self.seconds, self.patience = app, body, seconds, patience
        self._key = None if key is None else f"Bearer {key}".encode()
        self.statuses: Counter[int] = Counter()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = 499

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._handle(scope, receive, counted)
        finally:
            self.statuses[status] += 1

    async def _handle(self, scope: Message, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        if not self._knows(scope["path"], headers.get(b"authorization", b"")):
            return await refuse(send, 401, "a wrong or missing API key", "invalid_api_key")
        try:
            async with asyncio.timeout(self.patience):
                body = await self._read(receive)
        except TimeoutError:
            return await refuse(send, 408, f"a body that took longer than {self.patience:g} s", "timeout")
        if body is None:
            return None
        if len(body) > self.body:
            return await refuse(send, 413, f"a body of {len(body)} bytes or more; expected at most {self.body}",
                                "body_too_large")
        return await self._run(scope, body, receive, send)

    def _knows(self, path: str, given: bytes) -> bool:
        return self._key is None or path in OPEN or hmac.compare_digest(given, self._key)

    async def _read(self, receive: Receive) -> bytes | None:
        """The body; more than allowed where it is too large, None where the client has gone."""
        parts, size = [], 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            part = message.get("body", b"")
            size += len(part)
            if size <= self.body:
                parts.append(part)
            if not message.get("more_body", False) or size > DRAINED * self.body:
                return b"".join(parts) if size <= self.body else bytes(self.body + 1)

    async def _run(self, scope: Message, body: bytes, receive: Receive, send: Send) -> None:
        given = False

        async def replay() -> Message:
            nonlocal given
            if given:
                await asyncio.Event().wait()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        work = asyncio.ensure_future(self.app(scope, replay, send))
        watch = asyncio.ensure_future(gone(receive))
        try:
            await asyncio.wait({work, watch}, timeout=self.seconds, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
        finally:
            for task in (work, watch):
                task.cancel()
            await asyncio.gather(work, watch, return_exceptions=True)


async def gone(receive: Receive) -> None:
    """Returns when the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def refuse(send: Send, status: int, message: str, code: str) -> None:
    """Answer with an error."""
    body = json.dumps(error(message, code=code)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status in (408, 413):
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
