"""Lets a subpackage be called: `layerwise.measure` is both the folder of instruments and the verb.

Importing a subpackage binds its name on the parent package, which would hide a function of the same
name. Here the module object itself takes the call, so both readings hold whatever was imported first.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from types import ModuleType
from typing import Any


class CallableModule(ModuleType):
    """A module that passes calls on to the function at `_place`, imported on first use."""

    _place: str

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._function)

    @property
    def _function(self) -> Any:
        module, attribute = self._place.split(":")
        return getattr(importlib.import_module(module), attribute)


def make_callable(package: str, place: str) -> None:
    """Make the imported module `package` call the function at `place`, written `module:attribute`."""
    module = sys.modules[package]
    module.__class__ = CallableModule
    module.__dict__["_place"] = place
