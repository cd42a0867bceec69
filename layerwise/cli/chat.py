"""`layerwise chat`: a conversation in the terminal."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Annotated

import typer

from layerwise.cli.engine import engine
from layerwise.cli.options import CachePrecision, Device, Json, Layers, Model
from layerwise.cli.screen import Screen

if TYPE_CHECKING:
    from rich.console import Console

    from layerwise.serve.talk import Talk


COMMANDS = "/clear begins anew, /exit or Ctrl-D ends, Ctrl-C interrupts an answer"
PROMPT = "\001\033[1;36m\002> \001\033[0m\002"
"""Bold and cyan; what stands between the marks 1 and 2 has no width on the screen."""


def chat(
    model: Model,
    system: Annotated[str | None, typer.Option("--system", "-s", help="Instructions before the conversation.")] = None,
    temperature: Annotated[float, typer.Option("--temperature", "-t", help="0 takes the likeliest token.")] = 0.7,
    top_p: Annotated[float, typer.Option("--top-p", help="Draw among tokens that make up this share.")] = 0.95,
    seed: Annotated[int | None, typer.Option("--seed", help="Draws the tokens; by default another every time.")] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", "-n", help="Tokens of one answer.", min=1)] = 512,
    device: Device = None,
    cache_precision: CachePrecision = "model",
    layers: Layers = None,
    as_json: Json = False,
) -> None:
    """Talk with a model.

    /clear begins anew, /exit or Ctrl-D ends, Ctrl-C interrupts an answer. Lines may also be piped in.
    """
    from rich.console import Console

    from layerwise.serve.request import Params
    from layerwise.serve.talk import Talk

    screen = Screen(as_json)
    params = Params(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    screen.tell(f"opening {model}")
    talk = Talk(engine(model, device, layers, cache_precision, running=1), params, system)
    console = Console(stderr=as_json, highlight=False)
    if sys.stdin.isatty():
        console.print(COMMANDS, style="dim")
    going = True
    while going:
        try:
            going = turn(talk, console)
        except KeyboardInterrupt:  # at any moment but in an answer
            going = sys.stdin.isatty()
            if going:
                console.print("\n(Ctrl-D ends)", style="dim")
    screen.finish({"messages": talk.messages})


def turn(talk: Talk, console: Console) -> bool:
    """Read a line and do what it says; whether the conversation goes on."""
    try:
        text = said(console)
    except (EOFError, StopIteration):
        return False
    if text in ("/exit", "/quit"):
        return False
    if text == "/clear":
        talk.clear()
    elif text.startswith("/") and text[1:].isalpha():
        console.print(COMMANDS, style="dim")
    elif text:
        reply(talk, text, console)
    return True


def said(console: Console) -> str:
    """What the user says next; piped lines are shown as if typed."""
    if sys.stdin.isatty():
        return typed_line(console).strip()
    text = next(sys.stdin).strip()
    if text and text not in ("/exit", "/quit"):
        console.print(f"> {text}", style="bold cyan", markup=False)
    return text


def typed_line(console: Console) -> str:
    """A line from the keyboard, edited and recalled with the arrow keys where the system can."""
    if console.stderr or console.no_color:
        return console.input("> ")
    with suppress(ImportError):
        import readline  # noqa: F401 - input() uses it once it is there
    return input(PROMPT)


def reply(talk: Talk, text: str, console: Console) -> None:
    """Show the answer while it is written; Ctrl-C ends it."""
    from layerwise.serve.request import TooLong

    began = time.perf_counter()
    pieces = talk.say(text)
    try:
        with interrupted() as pressed:
            for piece in pieces:
                console.print(piece, end="", markup=False, soft_wrap=True)
                if pressed:
                    break
            pieces.close()
    except TooLong as error:
        console.print(f"{error.given}; {error.do}: {error.expected}", style="red", markup=False)
        return
    console.print()
    if talk.forgotten:
        console.print(f"({talk.forgotten} earlier turns no longer fit and are forgotten)", style="dim")
    if talk.written:
        rate = talk.written / (time.perf_counter() - began)
        console.print(f"{talk.written} tokens, {rate:.1f} tokens/s", style="dim")


@contextmanager
def interrupted() -> Iterator[list[int]]:
    """Ctrl-C joins the list instead of breaking off whatever runs, so that no step of an engine is left half done."""
    pressed: list[int] = []
    kept = signal.signal(signal.SIGINT, lambda number, _: pressed.append(number))
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, kept)
