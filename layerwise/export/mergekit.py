"""mergekit: a recipe of layer slices that takes the same layers out of the original, weights untouched.

The recipe is run by `mergekit-yaml recipe.yaml folder`; layers are numbered as in the original.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import ClassVar

from layerwise.errors import BadOption
from layerwise.export.base import NOTHING, Allowed, Export, Written, refuse
from layerwise.export.source import Source
from layerwise.io import atomic


class Mergekit(Export):
    """The dropped layers of a plan as a passthrough merge."""

    summary: ClassVar[str] = "a recipe of layer slices for mergekit-yaml"
    suffix: ClassVar[str] = ".yaml"

    def write(self, source: Source, output: Path, allowed: Allowed = NOTHING) -> Written:
        """Write the recipe to `output`.

        Raises BadOption where there is no plan, or where it does more than drop layers and `dense` is not
        allowed.
        """
        plan, model = source.plan, source.origin
        if plan is None or model is None:
            raise BadOption(f"{source.name} without its plan", expected="a plan that drops layers",
                            do="give the run folder, or the original model with --plan")
        other = [edit for edit in plan.edits if edit.arguments.get("part", "layer") != "layer" or
                 edit.transform != "drop"]
        if other and not allowed.dense:
            target = other[0].target
            place = f"layer {target}" if isinstance(target, int) else f"the {target}"
            raise refuse(f"{other[0]} for {place}", "mergekit", "whole layers dropped, all else as it was",
                         "allow --allow-dense to write the dropped layers alone")
        text = recipe(_resolved(model), source.layers, source.original.dtype)
        notes = [f"{len(source.layers)} of {len(source.original.rows)} layers"]
        if other:
            notes.append(f"{len(other)} edits left out, such as {other[0]}")
        atomic.write_text(output, text)
        return Written(output, output.stat().st_size, tuple(notes))


def recipe(model: str, layers: tuple[int, ...], dtype: str) -> str:
    """The YAML that keeps `layers` of `model`: one slice for each run of neighbours, ends excluded."""
    lines = ["slices:"]
    for first, last in runs(layers):
        lines += ["- sources:", f"  - model: {json.dumps(model)}", f"    layer_range: [{first}, {last + 1}]"]
    return "\n".join([*lines, "merge_method: passthrough", f"dtype: {dtype}"]) + "\n"


def runs(layers: tuple[int, ...]) -> list[tuple[int, int]]:
    """Runs of neighbours in rising numbers: (first, last) of each."""
    groups = itertools.groupby(enumerate(layers), key=lambda item: item[1] - item[0])
    members = [[layer for _, layer in group] for _, group in groups]
    return [(run[0], run[-1]) for run in members]


def _resolved(model: str) -> str:
    """A folder or hub id; names of demo models become their folder."""
    from layerwise.io.demos import DEMOS, demo

    return str(demo(model)) if model in DEMOS and not Path(model).exists() else model
