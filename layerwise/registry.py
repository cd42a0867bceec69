"""A table of names to places in the code, resolved when a name is used and not before."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from importlib.metadata import entry_points
from typing import Any

from layerwise.errors import UnknownName


class Registry(Mapping[str, Any]):
    """Maps a name to the object at `module:attribute`.

    Outside packages add entries through the entry-point group `layerwise.<kind>`; a built-in name wins.
    Raises UnknownName, with near misses, for a name that is in neither.
    """

    def __init__(self, kind: str, table: Mapping[str, str]) -> None:
        self.kind, self.table = kind, dict(table)

    def __getitem__(self, name: str) -> Any:
        place = self.table.get(name) or self.places().get(name)
        if place is None:
            raise UnknownName(self.kind, name, self.places())
        module, attribute = place.split(":")
        return getattr(importlib.import_module(module), attribute)

    def __iter__(self) -> Iterator[str]:
        return iter(self.places())

    def __len__(self) -> int:
        return len(self.places())

    def __contains__(self, name: object) -> bool:
        return name in self.places()

    def places(self) -> dict[str, str]:
        """Every known name with its `module:attribute`, plug-ins included."""
        group = f"layerwise.{self.kind.replace(' ', '_')}"
        return {point.name: point.value for point in entry_points(group=group)} | self.table
