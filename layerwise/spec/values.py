"""Frozen dataclasses as plain JSON values and back, and what differs between two of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import cache
from typing import Any, get_args, get_origin, get_type_hints

from layerwise.errors import BadOption

LATER = {"later": True}
"""Metadata of a field that came later: it is written where it is not the default, so that older tables stay equal."""

TAGGED = ("Attention", "FeedForward", "Opaque", "StateSpace", "Tiers")
"""Classes that are written with their name, since another may stand in their place."""


def encode(value: Any) -> Any:
    """Dataclasses as mappings of their fields, tuples as lists."""
    if dataclasses.is_dataclass(value):
        kind = type(value).__name__
        fields = {f.name: encode(getattr(value, f.name)) for f in dataclasses.fields(value)
                  if not (f.metadata.get("later") and getattr(value, f.name) == f.default)}
        return {"kind_of": kind, **fields} if kind in TAGGED else fields
    if isinstance(value, Mapping):
        return {str(key): encode(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [encode(item) for item in value]
    return value


def decode(cls: type, value: Mapping[str, Any]) -> Any:
    """The inverse of `encode` for an object of the dataclass `cls`. Raises BadOption on unknown or missing keys."""
    known = {f.name: f for f in dataclasses.fields(cls)}
    unknown = set(value) - set(known) - {"kind_of"}
    required = {name for name, f in known.items()
                if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING}
    missing = required - set(value)
    if unknown or missing:
        raise BadOption(
            f"a {cls.__name__} with unknown keys {sorted(unknown)} and missing keys {sorted(missing)}",
            expected=f"the keys {sorted(known)}", do="write the table with this version of layerwise")
    hints = _hints(cls)
    return cls(**{name: _item(hints[name], item) for name, item in value.items() if name != "kind_of"})


def differences(path: str, a: Any, b: Any) -> Any:
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        for key in sorted(set(a) | set(b)):
            yield from differences(f"{path}.{key}" if path else key, a.get(key), b.get(key))
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for index, (left, right) in enumerate(zip(a, b, strict=True)):
            yield from differences(f"{path}[{index}]", left, right)
    elif isinstance(a, list) and isinstance(b, list):
        yield f"{path}: {len(a)} entries -> {len(b)} entries"
    elif a != b:
        yield f"{path}: {a} -> {b}"


@cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def _item(hint: Any, item: Any) -> Any:
    """One value as its annotation wants it: a dataclass, a tuple of them, a mapping to them, or as it is."""
    if isinstance(item, list) and get_origin(hint) is tuple:
        return tuple(_item(get_args(hint)[0], each) for each in item)
    if not isinstance(item, Mapping):
        return item
    if get_origin(hint) is Mapping:
        return {key: _item(get_args(hint)[1], each) for key, each in item.items()}
    found = {cls.__name__: cls for cls in (hint, *get_args(hint))
             if isinstance(cls, type) and dataclasses.is_dataclass(cls)}
    if not found:
        return item
    plain = [name for name in found if len(found) == 1 or name not in TAGGED]
    kind = item.get("kind_of", plain[0] if len(plain) == 1 else None)
    if kind not in found:
        raise BadOption(f"a value of kind {kind!r}", expected=f"one of {sorted(found)}",
                        do="write the table with this version of layerwise")
    return decode(found[kind], item)
