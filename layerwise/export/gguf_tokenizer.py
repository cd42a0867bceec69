"""A tokenizer's files as GGUF metadata: byte-level vocabularies with merges, and sentencepiece ones with scores.

GGUF names the rule that splits text before merging instead of holding it, so only rules with a name there can
be written. A sentencepiece vocabulary that was converted to merges gets its scores back from their order.
Token types: 1 normal, 2 unknown, 3 control, 4 given by the user, 5 unused, 6 byte.
"""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

from layerwise.errors import BadModel
from layerwise.io.tokenizer import read_json

NORMAL, UNKNOWN, CONTROL, GIVEN, UNUSED, BYTE = range(1, 7)
PREFIX = "tokenizer.ggml"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
RULES = {("byte-level",): "gpt-2", ("digits", "byte-level"): "smollm", (GPT2,): "gpt-2",
         (WORDS % r"\p{N}{1,3}",): "llama-bpe", (WORDS % r"\p{N}",): "qwen2"}
"""What splits text before merging, to the name of that rule in GGUF."""

KNOWN = tuple(dict.fromkeys(RULES.values()))


def tokenizer_metadata(folder: Path, vocabulary: int) -> dict[str, Any]:
    """The metadata for the tokenizer in `folder` and a model of `vocabulary` tokens.

    Raises BadModel where the tokenizer is of a kind that GGUF has no name for.
    """
    stored = read_json(folder / "tokenizer.json")
    config_file = folder / "tokenizer_config.json"
    config = read_json(config_file) if config_file.exists() else {}
    model = stored["model"]
    if model["type"] != "BPE":
        raise _unknown(folder, f"a vocabulary of kind {model['type']}")
    vocab = dict(model["vocab"]) | {token["content"]: token["id"] for token in stored.get("added_tokens", ())}
    tokens = [f"[PAD{index}]" for index in range(vocabulary)]
    types = [UNUSED] * vocabulary
    for token, index in vocab.items():
        tokens[index], types[index] = token, NORMAL
    for token in stored.get("added_tokens", ()):
        types[token["id"]] = CONTROL if token["special"] else GIVEN
    kind = _sentencepiece if model.get("byte_fallback") else _byte_level
    found = {"tokens": tokens, "token_type": types, **kind(folder, stored, tokens, types)}
    found |= _special(config, vocab) | {"add_bos_token": _adds(stored, config.get("bos_token")), "add_eos_token": False}
    return {f"{PREFIX}.{key}": value for key, value in found.items()} | _chat(folder, config)


def no_tokenizer(vocabulary: int) -> dict[str, Any]:
    """The metadata of a model that has none."""
    return {f"{PREFIX}.model": "no_vocab", f"{PREFIX}.pre": "default"}


def _byte_level(folder: Path, stored: dict[str, Any], tokens: list[str], types: list[int]) -> dict[str, Any]:
    steps = _steps(stored.get("pre_tokenizer"))
    if steps not in RULES:
        raise _unknown(folder, f"text split by the rule {' then '.join(steps)}")
    return {"model": "gpt2", "pre": RULES[steps],
            "merges": [" ".join(merge) if isinstance(merge, list) else merge for merge in stored["model"]["merges"]]}


def _sentencepiece(folder: Path, stored: dict[str, Any], tokens: list[str], types: list[int]) -> dict[str, Any]:
    """Scores fall with the number of the token, which is the order in which the merges make them."""
    vocab = stored["model"]["vocab"]
    made = [vocab["".join(merge) if isinstance(merge, list) else merge.replace(" ", "")]
            for merge in stored["model"]["merges"]]
    if any(left > right for left, right in itertools.pairwise(made)):
        raise _unknown(folder, "merges in another order than their tokens")
    for index, token in enumerate(tokens):
        if token == stored["model"].get("unk_token"):
            types[index] = UNKNOWN
        elif re.fullmatch(r"<0x[0-9A-F]{2}>", token):
            types[index] = BYTE
    return {"model": "llama", "pre": "default", "scores": [-float(index) for index in range(len(tokens))],
            "add_space_prefix": "Prepend" in str(stored.get("normalizer"))}


def _steps(rule: dict[str, Any] | None) -> tuple[str, ...]:
    if rule is None:
        return ()
    if rule["type"] == "Sequence":
        return tuple(step for part in rule["pretokenizers"] for step in _steps(part))
    if rule["type"] == "ByteLevel":
        return ("byte-level",) if rule.get("use_regex", True) else ()
    if rule["type"] == "Digits" and rule.get("individual_digits"):
        return ("digits",)
    if rule["type"] == "Split" and "Regex" in rule["pattern"]:
        return (rule["pattern"]["Regex"],)
    return (rule["type"],)


def _special(config: dict[str, Any], vocab: dict[str, int]) -> dict[str, int]:
    found = {}
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token = config.get(f"{ours}_token")
        token = token.get("content") if isinstance(token, dict) else token
        if token in vocab:
            found[f"{theirs}_token_id"] = vocab[token]
    return found


def _adds(stored: dict[str, Any], token: Any) -> bool:
    """Whether the tokenizer puts the token that begins a text in front by itself."""
    name = token.get("content") if isinstance(token, dict) else token
    processor = stored.get("post_processor") or {}
    parts = [processor, *processor.get("processors", ())]
    firsts = [part["single"][0] for part in parts if part.get("single")]
    return any(first.get("SpecialToken", {}).get("id") == name for first in firsts)


def _chat(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    file = folder / "chat_template.jinja"
    template = file.read_text(encoding="utf-8") if file.exists() else config.get("chat_template")
    return {"tokenizer.chat_template": template} if isinstance(template, str) else {}


def _unknown(folder: Path, what: str) -> BadModel:
    return BadModel(f"the tokenizer in {folder} has {what}, which GGUF has no name for",
                    expected=f"a sentencepiece vocabulary, or one split by the rule of {', '.join(KNOWN)}",
                    do="convert the original model with llama.cpp's converter and use the rules of "
                    "`layerwise export --to llama.cpp-rules`")
