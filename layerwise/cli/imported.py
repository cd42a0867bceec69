"""A user's own objects by name: `package.module:name` or `file.py:name`, as in `layerwise profile models.py:build`."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerwise.errors import BadData, BadOption

if TYPE_CHECKING:
    from layerwise.stack.base import Stack


def names_code(text: str) -> bool:
    """Whether `text` means an object in code, not a file, a hub id or a data set."""
    place, _, name = text.rpartition(":")
    return bool(place) and name.isidentifier() and not Path(text).exists() and (
        place.endswith(".py") or all(part.isidentifier() for part in place.split(".")))


def imported(text: str) -> Any:
    """The object; what is callable and no module is called without arguments.

    Raises BadOption where there is no such file, module or name, or where running it fails.
    """
    place, _, name = text.rpartition(":")
    try:
        found = getattr(_module(place), name)
        return found() if callable(found) and not hasattr(found, "state_dict") else found
    except Exception as error:
        raise BadOption(f"{text}: {type(error).__name__}: {error}",
                        expected="package.module:name or file.py:name, a model or data, or a function that makes one",
                        do=f"try it in Python: from {Path(place).stem} import {name}") from error


def open_model(model: str) -> Stack:
    """A stack for a demo name, folder (of any family), hub id, file, or the module that code makes."""
    from torch import nn

    from layerwise.stack.base import Stack
    from layerwise.stack.foreign import foreign, open_foreign
    from layerwise.stack.open import open

    if not names_code(model):
        folder = foreign(model)
        return open(model) if folder is None else open_foreign(folder)
    module = imported(model)
    if isinstance(module, Stack):
        return module
    if not isinstance(module, nn.Module):
        raise BadOption(f"{model}, which makes a {type(module).__name__}", expected="a torch.nn.Module, or a stack",
                        do="return the model itself, or layerwise.open(model, blocks=[...])")
    return open(module.eval())


def check_text(stack: Stack) -> None:
    """Raise BadData for a module that reads no text, and so needs data of the user's."""
    from layerwise.stack.decoder import DecoderStack

    if not isinstance(stack, DecoderStack) and stack.tokenizer is None:
        raise BadData(f"no data for {stack.name}, which reads no text",
                      expected="batches of what its forward pass takes",
                      do="--data FILE.py:NAME, a list of batches or a function that makes one")


def _module(place: str) -> Any:
    if not place.endswith(".py"):
        sys.path.insert(0, "")
        try:
            return importlib.import_module(place)
        finally:
            sys.path.remove("")
    spec = importlib.util.spec_from_file_location(Path(place).stem, place)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
