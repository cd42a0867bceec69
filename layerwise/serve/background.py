"""The engine in a thread of its own, for callers that are asynchronous."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future

from layerwise.errors import BadOption
from layerwise.generate.sample import prompt_ids
from layerwise.serve.engine import Engine
from layerwise.serve.request import Event, Params, Request

Deliver = Callable[[Event], None]


class AsyncEngine:
    """Steps `engine` in a thread while there is work; many coroutines, of any event loop, may stream from it at once.

    A step that fails ends the requests it had with `error`, and the engine goes on. As a context manager it is closed
    at the end.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._streams: dict[str, Deliver] = {}
        self._closing = self._closed = False
        self._lock = threading.Lock()
        self._deadline = float("inf")
        self._thread = threading.Thread(target=self._work, name="layerwise-engine", daemon=True)
        self._thread.start()

    async def __aenter__(self) -> AsyncEngine:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def stream(self, request: Request | str | Sequence[int], params: Params | None = None
                     ) -> AsyncIterator[Event]:
        """Events of one request, or of a prompt (text or token ids) to be continued as `params` say.

        Raises what `Engine.add` raises; leaving the loop early cancels the request.
        """
        if not isinstance(request, Request):
            request = Request(tuple(prompt_ids(self.engine.stack, request)), params or Params())
        loop, news = asyncio.get_running_loop(), asyncio.Queue[Event]()

        def deliver(event: Event) -> None:
            loop.call_soon_threadsafe(news.put_nowait, event)

        try:
            await asyncio.wrap_future(self._submit(request, deliver))
        except asyncio.CancelledError:
            self.cancel(request.id)
            raise
        finished = False
        try:
            while not finished:
                event = await news.get()
                finished = event.finish is not None
                yield event
        finally:
            if not finished:
                self.cancel(request.id)

    def cancel(self, id: str) -> None:
        """End a request soon; its stream gets a last event. Unknown ids are ignored."""
        self._commands.put(lambda: self.engine.cancel(id))

    async def close(self, grace: float = 0.0) -> None:
        """Take no more requests, give running ones `grace` seconds, cancel the rest, and end the thread."""
        self._deadline = time.monotonic() + grace
        self._closing = True
        self._commands.put(lambda: None)
        await asyncio.to_thread(self._thread.join)

    # in the thread -------------------------------------------------------------------------------

    def _submit(self, request: Request, deliver: Deliver) -> Future[None]:
        done: Future[None] = Future()

        def add() -> None:
            if not done.set_running_or_notify_cancel():
                return
            try:
                if self._closing:
                    raise _closed()
                self.engine.add(request)
                self._streams[request.id] = deliver
                done.set_result(None)
            except Exception as error:
                done.set_exception(error)

        with self._lock:
            if self._closed:
                raise _closed()
            self._commands.put(add)
        return done

    def _work(self) -> None:
        while not self._closing or self.engine.busy:
            if self._closing and time.monotonic() >= self._deadline:
                for id in list(self._streams):
                    self.engine.cancel(id)
            self._obey()
            for event in self._step():
                self._tell(event)
        with self._lock:
            self._closed = True
        self._refuse()

    def _obey(self) -> None:
        """Carry out what was asked; waits for something where there is nothing to do."""
        if not self.engine.busy and not self._closing:
            self._commands.get()()
        while True:
            try:
                self._commands.get_nowait()()
            except queue.Empty:
                return

    def _step(self) -> list[Event]:
        try:
            return self.engine.step()
        except Exception as error:
            self.engine.fail(f"{type(error).__name__}: {error}")
            return self.engine.step()

    def _tell(self, event: Event) -> None:
        deliver = self._streams.get(event.id)
        if deliver is None:
            return
        if event.finish is not None:
            del self._streams[event.id]
        try:
            deliver(event)
        except RuntimeError:  # its event loop is closed
            self.engine.cancel(event.id)

    def _refuse(self) -> None:
        """Answer what came too late."""
        while not self._commands.empty():
            self._commands.get_nowait()()


def _closed() -> BadOption:
    return BadOption("a request to an engine that is closing", expected="a running engine", do="send it to another")
