"""Between HTTP and the engine: many requests become one stream, and time is limited."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass

from layerwise.errors import LayerwiseError
from layerwise.serve.background import AsyncEngine
from layerwise.serve.jobs import Jobs
from layerwise.serve.openai import ChatBody, CompletionBody
from layerwise.serve.render import Job
from layerwise.serve.request import Completion, Event, QueueFull, Request, Usage

INLINE = 4096
"""Bytes of a body that is cut into tokens at once; longer ones go to a thread."""


@dataclass(frozen=True)
class Bounds:
    """`body` bytes of a request, `prompt` tokens (None: what the engine takes), `seconds` that it may take."""

    body: int = 1 << 20
    prompt: int | None = None
    seconds: float = 600.0


class Refused(LayerwiseError):
    """The engine gave a request up: `fault` says whose fault it is, "client" or "server"."""

    def __init__(self, why: str, fault: str) -> None:
        self.fault = fault
        super().__init__(why, expected="an answer", do="change the request" if fault == "client" else "try again")


class Service:
    """Serves one engine under `name`."""

    def __init__(self, engine: AsyncEngine, name: str, bounds: Bounds | None = None) -> None:
        self.engine, self.name, self.bounds = engine, name, bounds or Bounds()
        self.jobs = Jobs(engine.engine, name, self.bounds.prompt)
        self.started = int(time.time())
        self.stopping = False
        self.first_token, self.answered = Spread(), Spread()
        self._cutters = ThreadPoolExecutor(2, "layerwise-tokens")
        self._compiler = ThreadPoolExecutor(1, "layerwise-grammar")

    async def job(self, body: CompletionBody | ChatBody, size: int) -> Job:
        """What a body of `size` bytes asks for; what takes long is done in a thread. Raises what `Jobs.make` raises."""
        loop = asyncio.get_running_loop()
        if body.response_format is not None:
            return await loop.run_in_executor(self._compiler, self.jobs.make, body)
        if size > INLINE:
            return await loop.run_in_executor(self._cutters, self.jobs.make, body)
        return self.jobs.make(body)

    # requests to events --------------------------------------------------------------------------

    async def events(self, job: Job) -> AsyncIterator[tuple[int, Event]]:
        """Events of all requests of a job as they come, with the number of the request.

        When time is up, requests end as if their `max_tokens` were reached. Raises QueueFull where they had no turn
        by then, Refused where the engine gives one up, and what `Engine.add` raises. Leaving the loop cancels all.
        """
        began = time.monotonic()
        news: asyncio.Queue[tuple[int, Event | Exception]] = asyncio.Queue()
        tasks = [asyncio.create_task(self._pump(index, request, news)) for index, request in enumerate(job.requests)]
        told = {index: 0 for index in range(len(tasks))}
        try:
            while told:
                left = began + self.bounds.seconds - time.monotonic()
                try:
                    async with asyncio.timeout(left):  # wait_for of Python 3.11 may lose that the client left
                        index, event = await news.get()
                except TimeoutError:
                    for index, event in self._out_of_time(job, told):
                        yield index, event
                    return
                if isinstance(event, Exception):
                    raise event
                _judge(event, job.requests[index])
                if event.tokens and told[index] == 0:
                    self.first_token.add(time.monotonic() - began)
                told[index] += len(event.tokens)
                if event.finish:
                    del told[index]
                yield index, event
            self.answered.add(time.monotonic() - began)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def whole(self, job: Job) -> list[Completion]:
        """All events of each request together."""
        found: list[list[Event]] = [[] for _ in job.requests]
        async with aclosing(self.events(job)) as events:  # type: ignore[type-var]
            async for index, event in events:
                found[index].append(event)
        return [Completion.of(request, each) for request, each in zip(job.requests, found, strict=True)]

    async def _pump(self, index: int, request: Request, news: asyncio.Queue[tuple[int, Event | Exception]]) -> None:
        try:
            async with aclosing(self.engine.stream(request)) as events:  # type: ignore[type-var]
                async for event in events:
                    news.put_nowait((index, event))
        except Exception as error:
            news.put_nowait((index, error))

    def _out_of_time(self, job: Job, told: dict[int, int]) -> list[tuple[int, Event]]:
        if not any(told.values()) and len(told) == len(job.requests):
            waited = f"no turn within {self.bounds.seconds:g} s"
            raise QueueFull(waited, expected="fewer requests", do="try again later")
        return [(index, Event(job.requests[index].id, finish="length",
                              usage=Usage(len(job.requests[index].prompt), 0, count)))
                for index, count in told.items()]

    def close(self) -> None:
        """End the threads that prepare requests."""
        self._cutters.shutdown(wait=False, cancel_futures=True)
        self._compiler.shutdown(wait=False, cancel_futures=True)


@dataclass
class Spread:
    """How many times something was measured, and the sum, in seconds."""

    count: int = 0
    total: float = 0.0

    def add(self, seconds: float) -> None:
        """One more."""
        self.count, self.total = self.count + 1, self.total + seconds

    @property
    def mean(self) -> float:
        return self.total / self.count if self.count else 0.0


def _judge(event: Event, request: Request) -> None:
    if event.finish == "error":
        grammar = request.params.grammar is not None and "grammar" in (event.error or "")
        raise Refused(event.error or "the engine failed", "client" if grammar else "server")
    if event.finish == "cancelled":
        raise Refused("the server is stopping", "server")
