"""Model folders of other families (encoders, vision transformers, ...): built by transformers, opened as modules."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from layerwise.errors import BadModel
from layerwise.io.places import cache_folder
from layerwise.io.source import WRAPPED
from layerwise.io.tokenizer import Tokenizer, read_json
from layerwise.nets.families import FAMILIES
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
    """The model of a folder as transformers builds it, without a head, float32, with its tokenizer if there is one.

    Raises BadModel where transformers cannot build it.
    """
    from transformers import AutoConfig, AutoModel

    try:
        module = AutoModel.from_pretrained(folder, local_files_only=True, dtype="float32")
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
