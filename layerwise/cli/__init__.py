"""The command line. `main` runs it; nothing heavy is imported before a command needs it."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from layerwise.errors import LayerwiseError


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and exit: 0 done, 1 not done, 2 wrong input, 130 interrupted.

    Errors are three lines on standard error: what was given, what was expected, what to do. With `--debug`
    they are tracebacks.
    """
    from layerwise.cli.app import app

    debug, given = _take_debug(list(sys.argv[1:] if arguments is None else arguments))
    try:
        app(given, prog_name="layerwise")
    except LayerwiseError as error:
        if debug:
            raise
        _complain(error.given, error.expected, error.do)
        sys.exit(2)
    except Exception as error:
        if debug:
            raise
        what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        _complain(what, "a command that runs to its end", "run it again with --debug to see where it stopped")
        sys.exit(1)


def _take_debug(arguments: list[str]) -> tuple[bool, list[str]]:
    """Whether `--debug` is given, anywhere before a `--`, and the arguments without it."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    kept = [argument for argument in arguments[:end] if argument != "--debug"]
    return len(kept) < end, kept + arguments[end:]


def _complain(given: str, expected: str, do: str) -> None:
    lines = f"error: {_one_line(given)}", f"  expected: {_one_line(expected)}", f"  do: {_one_line(do)}"
    print("\n".join(lines), file=sys.stderr)


def _one_line(text: str) -> str:
    return " ".join(text.split())
