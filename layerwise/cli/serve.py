"""`layerwise serve`: a model behind OpenAI's interface."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from layerwise.cli.engine import engine
from layerwise.cli.options import CachePrecision, Device, Json, Layers, Model
from layerwise.cli.screen import Screen
from layerwise.errors import BadOption, MissingExtra

if TYPE_CHECKING:
    from layerwise.serve.background import AsyncEngine
    from layerwise.serve.service import Service

DTYPES = ("float32", "bfloat16", "float16")


def serve(
    model: Model,
    port: Annotated[int, typer.Option("--port", "-p", help="0 takes a free one.", min=0, max=65535)] = 8000,
    host: Annotated[str, typer.Option("--host", help="0.0.0.0 lets other machines in.")] = "127.0.0.1",
    name: Annotated[str | None, typer.Option("--name", help="What clients call the model.")] = None,
    api_key: Annotated[
        str | None,
        typer.Option("--api-key", envvar="LAYERWISE_API_KEY", show_envvar=True, help="What clients must show."),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="float32, bfloat16 or float16; by default as stored.")
    ] = None,
    running: Annotated[int, typer.Option("--running", help="Requests at once.", min=1)] = 64,
    waiting: Annotated[int, typer.Option("--waiting", help="Requests in the queue; more get 429.", min=1)] = 1024,
    cache_tokens: Annotated[
        int | None, typer.Option("--cache-tokens", help="Tokens kept in the caches of all layers.", min=16)
    ] = None,
    device: Device = None,
    cache_precision: CachePrecision = "model",
    layers: Layers = None,
    prefix_cache: Annotated[bool, typer.Option(help="Share equal beginnings of prompts.")] = True,
    max_prompt: Annotated[int | None, typer.Option("--max-prompt", help="Tokens of a prompt.", min=1)] = None,
    max_body: Annotated[int, typer.Option("--max-body", help="Bytes of a request.", min=64)] = 1 << 20,
    seconds: Annotated[float, typer.Option("--timeout", help="Seconds for a request.", min=0.1)] = 600.0,
    grace: Annotated[float, typer.Option("--grace", help="Seconds to finish in after SIGTERM.", min=0)] = 30.0,
    as_json: Json = False,
) -> None:
    """Serve a model to OpenAI clients and browsers.

    Ends on Ctrl-C or SIGTERM, after the running requests.
    """
    from contextlib import closing
    from ipaddress import ip_address

    from layerwise.serve.run import bind, run

    screen = Screen(as_json)
    if dtype not in (None, *DTYPES):
        raise BadOption(f"--dtype {dtype}", expected=f"one of {', '.join(DTYPES)}",
                        do="leave it out to keep the stored one")
    with closing(bind(host, port)) as bound:
        screen.tell(f"opening {model}")
        from layerwise.serve.background import AsyncEngine

        made = engine(model, device, layers, cache_precision, dtype=dtype, running=running, waiting=waiting,
                      cache_tokens=cache_tokens, prefix_cache=prefix_cache)
        service = _service(AsyncEngine(made), name or made.stack.name, max_body, max_prompt, seconds)
        host, port = bound.getsockname()[:2]
        where = f"http://{host}:{port}"
        if not api_key and not ip_address(host).is_loopback:
            screen.tell("without --api-key, whoever reaches this address can use the model")
        run(service, bound, key=api_key or None, grace=grace,
            ready=lambda: screen.tell(f"serving {service.name} on {where} (page) and {where}/v1 (OpenAI)"))
    screen.tell("stopped")
    screen.finish({"model": service.name, "url": where, **made.metrics()})


def _service(running: AsyncEngine, name: str, body: int, prompt: int | None, seconds: float) -> Service:
    try:
        from layerwise.serve.service import Bounds, Service
    except ImportError as error:
        raise MissingExtra(error.name or "pydantic", "serve", "serving") from error
    return Service(running, name, Bounds(body, prompt, seconds))
