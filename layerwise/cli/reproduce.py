"""`layerwise reproduce`: run one published system and put its claims beside what is measured here."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from layerwise.cli.options import Json, Seed
from layerwise.cli.screen import Screen

VERDICTS = {True: "holds", False: "does not hold", None: "cannot tell at this size"}


def done_systems() -> list[str]:
    """Ids that can be run, for completion."""
    from layerwise.systems import SYSTEMS

    return list(SYSTEMS)


def reproduce(
    system: Annotated[str, typer.Argument(metavar="ID", help="See `layerwise systems`.", autocompletion=done_systems)],
    size: Annotated[
        str,
        typer.Option("--size", help="quick (about a minute) or full.", autocompletion=lambda: ["quick", "full"]),
    ] = "quick",
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Check what a published system claims.

    Each claim is printed beside what is measured here, with controls.

    Ends with status 0 whenever it ran to the end, whatever held.
    """
    from layerwise.systems.base import reproduce as run

    screen = Screen(as_json)
    screen.tell(f"running {system} at size {size}")
    checks = run(system, size, seed)  # type: ignore[arg-type]
    for check in checks:
        screen.show(f"\n{check.name}: {VERDICTS[check.holds]}")
        screen.show(f"  claim     {check.claim}")
        screen.show(f"  measured  {_short(check.measured)}")
        screen.show(f"  control   {_short(check.control)}")
        screen.show(f"  why       {check.why}")
    held = sum(check.holds is True for check in checks)
    screen.show(f"\n{held} of {len(checks)} claims hold at size {size}")
    screen.finish({"system": system, "size": size, "checks": [check.to_json() for check in checks]})


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    text = value if isinstance(value, str) else json.dumps(_rounded(value))
    return text if len(text) <= 400 else f"{text[:397]}..."


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    return value
