"""The engine in a thread of its own, for callers that are asynchronous."""

from __future__ import annotations

from collections.abc import AsyncIterator

from layerwise.serve.engine import Engine
from layerwise.serve.request import Event, Request


class AsyncEngine:
    """Runs `engine.step` in a thread while there is work; many coroutines may stream from it at once."""

    def __init__(self, engine: Engine) -> None:
        raise NotImplementedError

    def stream(self, request: Request) -> AsyncIterator[Event]:
        """Events of one request. Raises what `Engine.add` raises; leaving the loop cancels the request."""
        raise NotImplementedError

    async def close(self, grace: float = 0.0) -> None:
        """Take no more requests, give running ones `grace` seconds, cancel the rest, and end the thread."""
        raise NotImplementedError
