"""A layer table as a JSON file, for what one option for all layers cannot say.

    {"precision": {"0-9": "int8", "10-29": "int4"}, "budgets": {"12-29": 256}, "scorer": "attention", "skip": ["7"],
     "residency": {"20-29": "disk"}}

Layers count from 0; "12-29" are both ends and all between; every key may be left out. What the keys mean is said in
`layer_table` and, of `residency`, in `Staged`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from layerwise.errors import BadFile, BadOption
from layerwise.serve.residency import Place
from layerwise.serve.table import LayerTable, Precision, Scorer, layer_table
from layerwise.spec import StackSpec

PRECISIONS: tuple[Precision, ...] = get_args(Precision)
KEYS: dict[str, type | tuple[type, ...]] = {"precision": (str, dict), "budgets": dict, "scorer": str, "skip": list,
                                              "residency": dict}


def read_table(spec: StackSpec, file: Path | None = None, precision: str = "model"
               ) -> LayerTable | None:
    """The table of `spec` by a file; layers of which it says no precision have `precision`.

    None where nothing is asked for: the engine then reads it off the rows that it runs.

    Raises BadFile for a file that is no such description, BadOption where it does not fit the model.
    """
    if file is None and precision == "model":
        return None
    given: dict[str, Any] = {} if file is None else _read(file)
    chosen = given.get("precision", precision)
    by_layer = _by_layer(chosen, file) if isinstance(chosen, dict) else {}
    budgets = _by_layer(given.get("budgets", {}), file)
    common: Any = precision if isinstance(chosen, dict) else chosen
    each: dict[int, Precision] = dict.fromkeys(range(len(spec.rows)), common) | by_layer
    scorer = given.get("scorer", "recent")
    for name, value, known in (*(("precision", value, PRECISIONS) for value in each.values()),
                               ("scorer", scorer, get_args(Scorer))):
        if value not in known:
            raise BadOption(f"the {name} {value!r}", expected=", ".join(known), do="choose one of these")
    if file and not all(isinstance(tokens, int) for tokens in budgets.values()):
        raise _wrong(file, "has budgets that are no whole numbers")
    if len(each) > len(spec.rows):
        raise BadOption(f"layer {max(each)}", expected=f"a layer within 0..{len(spec.rows) - 1}",
                        do="count layers from 0")
    skip = [layer for text in given.get("skip", ()) for layer in _layers(text, file)]
    return layer_table(spec, precision=each, budgets=budgets, scorer=scorer, skip=skip)


def read_places(file: Path | None) -> dict[int, Place]:
    """Where the weights of layers wait, as the file says. Raises BadFile, or BadOption for another place."""
    places = _by_layer({} if file is None else _read(file).get("residency", {}), file)
    for place in places.values():
        if place not in get_args(Place):
            raise BadOption(f"the residency {place!r}", expected=", ".join(get_args(Place)), do="choose one of these")
    return {layer: place for layer, place in places.items() if place != "device"}


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
