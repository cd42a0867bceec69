"""What a transform does to the table: to a row, or to the embedding or the head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from layerwise.allocate.cost import tables
from layerwise.errors import BadOption
from layerwise.spec import LayerSpec, StackSpec, TableFormat
from layerwise.transform import TRANSFORMS


def edited_row(row: LayerSpec, hidden: int, transform: str | None,
               arguments: Mapping[str, Any]) -> LayerSpec | None:
    """`row` after the transform, None where the layer is gone. Raises BadOption where it cannot be."""
    if transform is None:
        return row
    edited: LayerSpec | None = TRANSFORMS[transform](**arguments).edit(row, hidden)
    return edited


def edited_table(spec: StackSpec, target: str, transform: str | None,
                 arguments: Mapping[str, Any]) -> StackSpec:
    """`spec` after packing its "embedding" or "head". Raises BadOption for a transform that does not pack."""
    if transform is None:
        return spec
    format = getattr(TRANSFORMS[transform](**arguments), "table_format", None)
    if not isinstance(format, TableFormat) or target not in tables(spec):
        raise BadOption(f"{transform} for the {target!r} of this model",
                        expected="quantize, for the embedding or a head of its own", do="remove this edit")
    if target == "embedding":
        return replace(spec, embedding_format=format)
    return replace(spec, head_format=format)
