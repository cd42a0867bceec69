"""Models from the Hugging Face hub, where it can be reached or has been fetched before."""

from __future__ import annotations

import re
from pathlib import Path

from layerwise.errors import BadFile

WANTED = ("*.json", "*.safetensors", "tokenizer.model", "*.jinja", "merges.txt")
UNWANTED = ("*/*", "consolidated*")
"""Copies of the weights in other formats, which some repositories hold beside the usual ones."""

ID = re.compile(r"[\w.-]+/[\w.-]+|[\w-]+")


def looks_like_id(name: str) -> bool:
    """Whether `name` is spelled like `owner/name` or one of the old ids without owner."""
    return ID.fullmatch(name) is not None


def snapshot(name: str) -> Path:
    """The folder of a hub model, fetched if the hub's own cache lacks it. Raises BadFile where that fails."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(WANTED), ignore_patterns=list(UNWANTED)))
    except Exception as error:  # offline, unknown, gated and damaged all end here, in many classes
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BadFile(f"{name!r} is no file or folder here, and the model hub gave none: {reason}",
                      expected="a folder, a .gguf file, a demo model's name, or a reachable hub id",
                      do="check the spelling and the network, or try a demo model: smollm2, gemma3-270m"
                      ) from error
