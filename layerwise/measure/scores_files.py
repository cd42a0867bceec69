"""Scores as a file: JSON for people, parquet for data frames; both carry everything.

In parquet the values are the columns of the table; units, directions, provenance and the layer table
travel as its metadata.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from layerwise.errors import BadFile, BadOption, LayerwiseError
from layerwise.io import atomic

FORMAT = "layerwise-scores-1"
T = TypeVar("T")


def write(path: Path, scores: Mapping[str, Any]) -> Path:
    """Write scores, as plain JSON values, to `path`. Raises BadOption for an ending that is neither."""
    if path.suffix == ".json":
        return atomic.write_text(path, json.dumps({"format": FORMAT, **scores}, indent=1) + "\n")
    if path.suffix == ".parquet":
        return atomic.write_bytes(path, _parquet(scores))
    raise BadOption(f"scores saved to {path.name!r}", expected="a name ending in .parquet or .json",
                    do="change the ending")


def read(path: Path, build: Callable[[Mapping[str, Any]], T]) -> T:
    """What `build` makes of the values in `path`. Raises BadFile where it is missing, damaged or foreign."""
    try:
        value = _from_parquet(path) if path.suffix == ".parquet" else json.loads(path.read_text())
        if value.get("format") != FORMAT:
            raise ValueError(f"the format {value.get('format')!r} instead of {FORMAT!r}")
        return build(value)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, LayerwiseError) as error:
        raise BadFile(f"scores in {path}: {error}", expected="a file written by Scores.save",
                      do="measure again, or point to the right file") from error


def _parquet(scores: Mapping[str, Any]) -> bytes:
    import pyarrow
    from pyarrow import parquet

    columns = {name: dict(fields) for name, fields in scores["columns"].items()}
    values = {name: [None if v is None else float(v) for v in fields.pop("values")]
              for name, fields in columns.items()}
    layers = range(len(scores["spec"]["rows"]))
    table = pyarrow.table({"layer": pyarrow.array(layers, pyarrow.int64())} | {
        name: pyarrow.array(column, pyarrow.float64()) for name, column in values.items()})
    about = {"format": FORMAT, **scores, "columns": columns}
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(table.replace_schema_metadata({"layerwise": json.dumps(about)}), sink)
    return bytes(sink.getvalue().to_pybytes())


def _from_parquet(path: Path) -> dict[str, Any]:
    from pyarrow import parquet

    table = parquet.read_table(path)
    about: dict[str, Any] = json.loads((table.schema.metadata or {}).get(b"layerwise", b"{}"))
    for name, fields in about.get("columns", {}).items():
        fields["values"] = table[name].to_pylist()
    return about
