"""Tokenizers go into GGUF metadata and come back encoding the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from layerwise.errors import BadModel
from layerwise.export.gguf import GGUF
from layerwise.export.gguf_tokenizer import WORDS, tokenizer_metadata
from layerwise.export.source import Source
from layerwise.io import tokenizer as io_tokenizer
from layerwise.stack.open import open as open_stack
from layerwise.testing.stacks import random_stack

TEXT = "ab abc  b\nabab 12 née <end>"


def byte_level(split: Any) -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([*alphabet, "ab", "abab", "Ġab", "<end>"])}
    found = Tokenizer(models.BPE(vocab=vocab, merges=[("a", "b"), ("ab", "ab"), ("Ġ", "ab")]))
    found.pre_tokenizer, found.decoder = split, decoders.ByteLevel()
    found.add_special_tokens(["<end>"])
    return found


def sentencepiece() -> Tokenizer:
    tokens = ["<unk>", "<bos>", "<end>", *(f"<0x{byte:02X}>" for byte in range(256)), "ab", "▁ab", "abab",
              *"ab▁cn12"]
    vocab = {token: index for index, token in enumerate(tokens)}
    merges = [("a", "b"), ("▁", "ab"), ("ab", "ab")]
    found = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    found.normalizer = normalizers.Replace(" ", "▁")
    found.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    found.add_special_tokens(["<unk>", "<bos>", "<end>"])
    found.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return found


def saved(found: Tokenizer, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    found.save(str(folder / "tokenizer.json"))
    tokens = {"eos_token": "<end>", "bos_token": {"content": "<bos>"}, "chat_template": "{{ messages }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokens))
    return folder


@pytest.mark.parametrize(("split", "rule"), [
    (pre_tokenizers.ByteLevel(add_prefix_space=False), "gpt-2"),
    (pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True),
                              pre_tokenizers.ByteLevel(add_prefix_space=False)]), "smollm"),
    (pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(WORDS % r"\p{N}{1,3}"), "isolated"),
                              pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]), "llama-bpe"),
    (pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(WORDS % r"\p{N}"), "isolated"),
                              pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]), "qwen2")])
def test_the_rule_of_splitting_gets_its_name(split: Any, rule: str, tmp_path: Path) -> None:
    found = tokenizer_metadata(saved(byte_level(split), tmp_path), 264)
    assert found["tokenizer.ggml.pre"] == rule and found["tokenizer.ggml.model"] == "gpt2"
    assert found["tokenizer.ggml.merges"] == ["a b", "ab ab", "Ġ ab"]
    assert found["tokenizer.ggml.tokens"][259:] == ["<end>", "[PAD260]", "[PAD261]", "[PAD262]", "[PAD263]"]
    assert found["tokenizer.ggml.token_type"][257:261] == [1, 1, 3, 5]
    assert found["tokenizer.ggml.eos_token_id"] == 259 and not found["tokenizer.ggml.add_bos_token"]
    assert found["tokenizer.chat_template"] == "{{ messages }}"


def test_scores_fall_in_the_order_of_merges(tmp_path: Path) -> None:
    found = tokenizer_metadata(saved(sentencepiece(), tmp_path), 269)
    assert found["tokenizer.ggml.model"] == "llama" and found["tokenizer.ggml.add_bos_token"]
    assert found["tokenizer.ggml.token_type"][:4] == [2, 3, 3, 6]
    scores = found["tokenizer.ggml.scores"]
    assert scores == sorted(scores, reverse=True) and not found["tokenizer.ggml.add_space_prefix"]


def test_the_file_encodes_like_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAYERWISE_CACHE", str(tmp_path / "cache"))
    stack = random_stack(1, vocabulary=260)
    stack.tokenizer = io_tokenizer.Tokenizer(saved(byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False)),
                                                   tmp_path / "tokenizer"))
    GGUF().write(Source(stack), tmp_path / "model.gguf")
    again = open_stack(tmp_path / "model.gguf").tokenizer
    assert again is not None and again.encode(TEXT) == stack.tokenizer.encode(TEXT)


def test_what_has_no_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadModel, match="the rule Whitespace"):
        tokenizer_metadata(saved(byte_level(pre_tokenizers.Whitespace()), tmp_path), 264)
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "Unigram"}}')
    with pytest.raises(BadModel, match="kind Unigram"):
        tokenizer_metadata(tmp_path, 264)
    mixed = sentencepiece()
    mixed.save(str(tmp_path / "tokenizer.json"))
    stored = json.loads((tmp_path / "tokenizer.json").read_text())
    stored["model"]["merges"].reverse()
    (tmp_path / "tokenizer.json").write_text(json.dumps(stored))
    with pytest.raises(BadModel, match="merges in another order"):
        tokenizer_metadata(tmp_path, 269)
