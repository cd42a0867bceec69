"""Running the server: a socket that is bound before the model is read, and an orderly end."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING

from layerwise.errors import BadOption, MissingExtra

if TYPE_CHECKING:
    import uvicorn

    from layerwise.serve.service import Service


def bind(host: str, port: int) -> socket.socket:
    """A socket to serve on; port 0 takes a free one. Raises BadOption where that is not possible."""
    bound = None
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, socket.SOCK_STREAM)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        return bound
    except (OSError, OverflowError) as error:
        if bound is not None:
            bound.close()
        raise BadOption(f"address {host}:{port}: {error}", expected="a free address of this machine",
                        do="choose another --port or --host") from error


def server(service: Service, *, key: str | None = None, grace: float = 30.0,
           ready: Callable[[], None] = lambda: None) -> uvicorn.Server:
    """A server that, told to exit, gives running requests `grace` seconds. `ready` is told when clients may come.

    Raises MissingExtra without fastapi and uvicorn.
    """
    try:
        import uvicorn

        from layerwise.serve.http import application
    except ImportError as error:
        raise MissingExtra(error.name or "fastapi", "serve", "serving") from error

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            ready()

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            service.stopping = True
            closing = asyncio.create_task(service.engine.close(grace))
            await super().shutdown(sockets)
            await service.engine.close()
            await closing
            service.close()

    return Server(uvicorn.Config(
        application(service, key), log_level="error", access_log=False, lifespan="off", server_header=False,
        timeout_graceful_shutdown=int(grace) + 5))


def run(service: Service, bound: socket.socket, *, key: str | None = None, grace: float = 30.0,
        ready: Callable[[], None] = lambda: None) -> None:
    """Serve until SIGTERM or SIGINT, and then end in order. Only in the main thread."""
    made = server(service, key=key, grace=grace, ready=ready)
    kept = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        made.run(sockets=[bound])
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
        bound.close()
