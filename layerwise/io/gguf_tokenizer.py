"""The tokenizer inside a GGUF file, converted once and kept in the cache."""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from pathlib import Path

from layerwise.errors import BadFile
from layerwise.io import atomic
from layerwise.io.gguf import GGUFFile
from layerwise.io.tokenizer import Tokenizer, read_json
from layerwise.places import cache_folder

PARTS = ("model", "pre", "tokens", "token_type", "scores", "merges")
ONLY_HERE = ("is_local", "local_files_only", "backend", "name_or_path")


class GGUFTokenizer(Tokenizer):
    """The tokenizer of `file`; the first use converts it, which takes up to half a minute."""

    def __init__(self, file: GGUFFile, limit: int | None = None) -> None:
        super().__init__(file.path, limit)
        self._file = file

    @cached_property
    def folder(self) -> Path:
        data = {name: self._file.metadata.get(f"tokenizer.ggml.{name}") for name in PARTS}
        data["chat"] = self._file.metadata.get("tokenizer.chat_template")
        key = hashlib.sha256(json.dumps(data).encode()).hexdigest()[:24]
        folder = cache_folder() / "tokenizers" / key
        if not (folder / "tokenizer.json").exists():
            with atomic.folder(folder) as beside:
                convert_tokenizer(self._file, beside)
        return folder


def convert_tokenizer(file: GGUFFile, folder: Path) -> None:
    """Write `tokenizer.json` and its configuration into `folder`; BadFile where `file` holds none we read."""
    from transformers import AutoTokenizer
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity(40)  # errors only
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(file.path.parent), gguf_file=file.path.name)
        tokenizer.save_pretrained(str(folder))
    except (ValueError, KeyError, TypeError, OSError, AttributeError) as error:
        raise BadFile(f"the tokenizer in {file.path} cannot be read: {error}",
                      expected="a byte-level or sentencepiece vocabulary",
                      do="open the original Hugging Face folder instead") from error
    finally:
        logging.set_verbosity(before)
    config = read_json(folder / "tokenizer_config.json")
    kept = {key: value for key, value in config.items() if key not in ONLY_HERE}
    text = json.dumps(kept | {"tokenizer_class": "PreTrainedTokenizerFast"}, indent=2, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")
