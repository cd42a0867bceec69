"""`layerwise apply`: carry out a plan and save the model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from layerwise.cli.options import Data, Json, Model
from layerwise.cli.screen import Screen

if TYPE_CHECKING:
    from layerwise.allocate.plan import Plan


def apply(
    model: Model,
    plan: Annotated[Path, typer.Argument(help="A plan.json, as written by optimize or by hand.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the new model.")],
    data: Data = "default",
    as_json: Json = False,
) -> None:
    """Carry out a plan and save the new model.

    A plan belongs to the model it was made for. The saved model is re-opened and compared before it is put
    in its place.
    """
    from layerwise.allocate.apply import apply as carry_out
    from layerwise.allocate.plan import Plan
    from layerwise.report.layers import kept_layers, layer_changes
    from layerwise.report.optimize import calibration_text
    from layerwise.report.table import got, size
    from layerwise.stack.open import open

    screen = Screen(as_json)
    wanted = Plan.load(plan)
    screen.tell(f"opening {model}")
    stack = open(model)
    spec = wanted.edited(stack.spec)
    calibration = calibration_text(stack, data, wanted.seed) if needs_text(wanted) else None
    screen.tell("carrying out the plan")
    slim = carry_out(stack, wanted, calibration)
    screen.tell(f"saving to {output}")
    slim.save(output)
    changes = layer_changes(stack.spec, spec, kept_layers(stack.spec, wanted))
    screen.show(got(changes))
    screen.show(f"\n{size(stack.spec.bytes())} before, {size(spec.bytes())} after, saved in {output}")
    screen.finish({"model": output, "bytes": spec.bytes(), "parameters": spec.parameters(), "layers": len(spec.rows)})


def needs_text(plan: Plan) -> bool:
    """Whether carrying out the plan takes calibration text."""
    from layerwise.transform import TRANSFORMS

    return any("gram" in TRANSFORMS[edit.transform](**edit.arguments).needs for edit in plan.edits)
