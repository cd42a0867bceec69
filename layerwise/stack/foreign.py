"""Model folders of other families (encoders, vision transformers, ...): built by transformers, opened as modules."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from layerwise.errors import BadModel
from layerwise.io.source import WRAPPED
from layerwise.io.tokenizer import Tokenizer, read_json
from layerwise.nets.families import FAMILIES
from layerwise.places import cache_folder
from layerwise.stack.module import ModuleStack

OURS = {"layerwise", "layerwise-vision-language", *WRAPPED}


def foreign(source: str | Path) -> Path | None:
    """The folder, where `source` is one (or a name in the model cache) that no family of ours reads; else None."""
    for folder in (Path(source).expanduser(), cache_folder() / "models" / str(source)):
        if (folder / "config.json").is_file():
            kind = read_json(folder / "config.json").get("model_type")
            return None if kind is None or kind in FAMILIES or kind in OURS else folder
    return None


def open_foreign(folder: Path) -> ModuleStack:
    """The model of a folder as transformers builds it, float32, with its tokenizer if there is one.

    A classifier has its head, so that labels can be used; any other model comes without one. Raises BadModel where
    transformers cannot build it.
    """
    from transformers import AutoConfig

    try:
        with _quiet():
            module = _builder(folder).from_pretrained(folder, local_files_only=True, dtype="float32")
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise BadModel(f"{folder}, which transformers cannot build: {error}",
                       expected="a folder that AutoModel.from_pretrained reads",
                       do="build the model in code and name it: models.py:build") from error
    tokenizer = Tokenizer(folder) if (folder / "tokenizer.json").exists() else None
    stack = ModuleStack(module.eval().requires_grad_(False), name=folder.name, tokenizer=tokenizer)
    stack.folder = folder
    places = getattr(AutoConfig.from_pretrained(folder, local_files_only=True), "max_position_embeddings", None)
    if isinstance(places, int):
        stack.spec = replace(stack.spec, context=places)
    return stack


def _builder(folder: Path) -> Any:
    """The class that builds the model of a folder: the classifier it names, else what has no head."""
    import transformers

    for name in read_json(folder / "config.json").get("architectures") or ():
        if name.endswith("Classification") and hasattr(transformers, name):
            return getattr(transformers, name)
    return transformers.AutoModel


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the bar and the table that transformers prints while it loads."""
    from transformers.utils import logging

    said: Any = logging  # most of its functions have no types
    level, bar = said.get_verbosity(), said.is_progress_bar_enabled()
    said.set_verbosity_error()
    said.disable_progress_bar()
    try:
        yield
    finally:
        said.set_verbosity(level)
        if bar:
            said.enable_progress_bar()
