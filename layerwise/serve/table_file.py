"""A layer table as a JSON file, for what one option for all layers cannot say.

    {"precision": {"0-9": "int8", "10-29": "int4"}, "budgets": {"12-29": 256}, "scorer": "attention", "skip": ["7"],
     "residency": {"20-29": "disk"}}

Layers count from 0; "12-29" are both ends and all between; every key may be left out. What the keys mean is said in
`layer_table`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from layerwise.errors import BadFile
from layerwise.serve.table import LayerTable, layer_table
from layerwise.spec import StackSpec

KEYS: dict[str, type | tuple[type, ...]] = {"precision": (str, dict), "budgets": dict, "scorer": str, "skip": list,
                                              "residency": dict}


def read_table(spec: StackSpec, file: Path | None = None, precision: str = "model") -> LayerTable | None:
    """The table of `spec` by a file; layers of which it says no precision have `precision`.

    None where nothing is asked for: the engine then reads it off the rows that it runs.

    Raises BadFile for a file that is no such description, BadOption where it does not fit the model.
    """
    if file is None and precision == "model":
        return None
    given: dict[str, Any] = {} if file is None else _read(file)
    chosen, budgets = given.get("precision", precision), _by_layer(given.get("budgets", {}), file)
    common: Any = precision if isinstance(chosen, dict) else chosen
    each = dict.fromkeys(range(len(spec.rows)), common) | (_by_layer(chosen, file) if isinstance(chosen, dict) else {})
    if not all(isinstance(tokens, int) for tokens in budgets.values()):
        raise _wrong(file, "has budgets that are no whole numbers")
    return layer_table(spec, precision=each, budgets=budgets, scorer=given.get("scorer", "recent"),
                       skip=[layer for text in given.get("skip", ()) for layer in _layers(text, file)],
                       residency=_by_layer(given.get("residency", {}), file))


def streams(file: Path | None) -> bool:
    """Whether the file lets layers wait elsewhere, so that the model is to be opened with `stream=True`."""
    places = {} if file is None else _read(file).get("residency", {})
    return any(place != "device" for place in places.values())


def _read(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_bytes())
    except OSError as error:
        raise _wrong(file, f"cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise _wrong(file, f"is no JSON: {error}") from error
    if not isinstance(value, dict) or not set(value) <= set(KEYS):
        raise _wrong(file, f"holds {', '.join(sorted(set(value) - set(KEYS)))}" if isinstance(value, dict)
                     else f"holds a {type(value).__name__}")
    for key, kind in KEYS.items():
        if key in value and not isinstance(value[key], kind):
            raise _wrong(file, f"has a {type(value[key]).__name__} as {key!r}")
    return value


def _by_layer(values: Mapping[str, Any], file: Path | None) -> dict[int, Any]:
    return {layer: value for text, value in values.items() for layer in _layers(text, file)}


def _layers(text: object, file: Path | None) -> range:
    """`7` or `12-29` as layers."""
    found = re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", str(text))
    first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
    if first > last:
        raise _wrong(file, f"names the layers {text!r}")
    return range(first, last + 1)


def _wrong(file: Path | None, why: str) -> BadFile:
    return BadFile(f"the layer table {file} {why}",
                   expected='JSON such as {"precision": {"0-9": "int8"}, "budgets": {"12-29": 256}, "skip": ["7"]}',
                   do="see the section on caches in docs/serve.md")
