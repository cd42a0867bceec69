"""All commands together, in the order of the job they do."""

from __future__ import annotations

from typing import Annotated

import typer

from layerwise import __version__
from layerwise.cli.apply import apply
from layerwise.cli.batch import batch
from layerwise.cli.chat import chat
from layerwise.cli.compare import compare
from layerwise.cli.doctor import doctor
from layerwise.cli.export import export
from layerwise.cli.generate import generate
from layerwise.cli.optimize import optimize
from layerwise.cli.pareto import pareto
from layerwise.cli.profile import profile
from layerwise.cli.reproduce import reproduce
from layerwise.cli.serve import serve
from layerwise.cli.systems import systems

app = typer.Typer(
    name="layerwise",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)

COMMANDS = (profile, optimize, pareto, apply, export, compare, generate, chat, serve, batch, systems, reproduce, doctor)

for command in COMMANDS:
    app.command()(command)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"layerwise {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_version, is_eager=True)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback where something fails.")] = False,
) -> None:
    """Open a neural network to its layers, measure them, fit them to a budget, and verify the result.

    A MODEL is a demo name (smollm2, gemma3-270m), a Hugging Face folder or id, or a .gguf file.
    """
