"""Every error a user can meet, in three parts: what was given, what was expected, what to do.

    LayerwiseError
    ├── BadFile        a file or folder that is damaged, incomplete or of the wrong kind
    ├── BadData        data that is empty, too short, or does not fit the model
    ├── BadModel       a model layerwise cannot open to layers, or with wrong weights
    ├── BadBudget      a limit that cannot be met or read
    ├── BadPlan        a plan that does not belong to this model
    ├── BadOption      an argument with an impossible value
    ├── UnknownName    a name that is not in a registry
    └── MissingExtra   an optional package that is not installed
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LayerwiseError(Exception):
    """Base class: `given` says what arrived, `expected` what would have worked, `do` the next step."""

    def __init__(self, given: str, *, expected: str, do: str) -> None:
        self.given, self.expected, self.do = given, expected, do
        super().__init__(f"{given}\n  expected: {expected}\n  do: {do}")


class BadFile(LayerwiseError):
    """A file or folder is damaged, incomplete or of the wrong kind."""


class BadData(LayerwiseError):
    """Data is empty, too short, or does not fit the model."""


class BadModel(LayerwiseError):
    """A model cannot be opened to layers, or its weights are wrong."""


class BadBudget(LayerwiseError):
    """A limit cannot be met, or cannot be read."""


class BadPlan(LayerwiseError):
    """A plan does not belong to this model."""


class BadOption(LayerwiseError):
    """An argument has an impossible value."""


class UnknownName(LayerwiseError):
    """A name is not in a registry."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        names = sorted(known)
        near = difflib.get_close_matches(name, names, n=3)
        do = f"did you mean {' or '.join(repr(n) for n in near)}?" if near else "pick one of the names above"
        super().__init__(f"no {kind} is called {name!r}", expected=f"one of: {', '.join(names)}", do=do)


class MissingExtra(LayerwiseError):
    """An optional package is not installed."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the package {package!r}, which is not installed",
            expected=f"the optional extra {extra!r}",
            do=f"pip install 'layerwise[{extra}]'",
        )
