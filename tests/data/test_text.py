"""Text becomes blocks of tokens."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from layerwise.data import TextData, text_blocks
from layerwise.data.split import divide
from layerwise.data.text import Tokenizer, by_frequency, encoder, frame, token_counts
from layerwise.errors import BadData, BadOption

TEXT = "\n\n".join(" ".join(f"word{paragraph}n{word}" for word in range(60)) for paragraph in range(60))


def test_blocks_follow_the_text_without_filling(byte_tokenizer: Tokenizer) -> None:
    data = TextData.from_text(TEXT, byte_tokenizer, length=64)
    assert data.mask_NT is None
    assert data.tokens_NT.dtype == torch.int64
    assert bytes(data.tokens_NT.flatten().tolist()).decode() == TEXT[:len(TEXT) // 64 * 64]
    assert data.source.tokens == len(TEXT)
    assert data.source.sha256 == hashlib.sha256(TEXT.encode()).hexdigest()


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 300), st.integers(1, 5), st.none() | st.integers(0, 9))
def test_length_blocks_and_seed_never_move_text_between_splits(
        length: int, blocks: int, seed: int | None) -> None:
    class Bytes:
        def encode(self, text: str) -> list[int]:
            return list(text.encode())

    halves = {split: "".join(parts).encode() for split, parts in divide([TEXT]).items()}
    for split in ("calibration", "verification"):
        data = TextData.from_text(TEXT, Bytes(), length=length, blocks=blocks, split=split, seed=seed)
        for row, index in zip(data.tokens_NT.tolist(), data.source.chosen, strict=True):
            assert bytes(row) == halves[split][index * length:(index + 1) * length]


def test_tokens_by_frequency_in_all_the_text(byte_tokenizer: Tokenizer) -> None:
    data = TextData.from_text(TEXT, byte_tokenizer, length=64, blocks=4)
    counts_V = token_counts(data)
    assert counts_V.sum() == len(TEXT) and counts_V[ord("w")] == TEXT.count("w")
    order = by_frequency(data, 256).tolist()
    assert sorted(order) == list(range(256)) and order[0] == max(range(256), key=list(TEXT.encode()).count)
    known = len(set(TEXT))
    assert set(map(chr, order[:known])) == set(TEXT) and order[known:] == sorted(order[known:])
    assert order[:3] != by_frequency(data, 3).tolist() == [0, 1, 2], "tokens beyond the vocabulary are not there"
    left = token_counts(data.skip(1).without(data.take(1)))
    assert left.sum() == len(TEXT) - 64 and token_counts(data.take(2)).equal(counts_V)
    prompts = TextData.from_prompts(["abc", "a"], byte_tokenizer)
    assert token_counts(prompts)[[ord("a"), ord("b"), 0]].tolist() == [2, 1, 0]


def test_seed_draws_and_more_blocks_contain_the_fewer(byte_tokenizer: Tokenizer) -> None:
    def chosen(blocks: int, seed: int | None) -> tuple[int, ...]:
        return TextData.from_text(TEXT, byte_tokenizer, length=32, blocks=blocks, seed=seed).source.chosen

    assert chosen(8, None) == tuple(range(8))
    assert chosen(8, 0) == chosen(8, 0)
    assert chosen(8, 0) != chosen(8, 1)
    assert set(chosen(8, 0)) < set(chosen(16, 0))
    assert list(chosen(16, 0)) == sorted(chosen(16, 0))


def test_special_tokens_stand_around_every_block(framed_tokenizer: Tokenizer) -> None:
    assert frame(framed_tokenizer.encode) == ([256], [257])
    data = TextData.from_text(TEXT, framed_tokenizer, length=34, blocks=5, seed=None)
    assert data.tokens_NT[:, 0].tolist() == [256] * 5
    assert data.tokens_NT[:, -1].tolist() == [257] * 5
    assert bytes(data.tokens_NT[:, 1:-1].flatten().tolist()).decode() == TEXT[:160]


def test_special_tokens_on_request_are_asked_for() -> None:
    class OnRequest:
        def encode(self, text: str, *, special: bool = False) -> list[int]:
            return [256] * special + list(text.encode())

    assert frame(encoder(OnRequest())) == ([256], [])
    assert TextData.from_prompts(["a"], OnRequest()).tokens_NT.tolist() == [[256, 97]]
    assert TextData.from_text(TEXT, OnRequest(), length=8).tokens_NT[:, 0].unique().tolist() == [256]


def test_batches_cover_all_blocks_in_order(byte_tokenizer: Tokenizer) -> None:
    data = TextData.from_text(TEXT, byte_tokenizer, length=32, blocks=10)
    batches = list(data.batches(4))
    assert [len(batch.tokens_BT) for batch in batches] == [4, 4, 2]
    assert torch.equal(torch.cat([batch.tokens_BT for batch in batches]), data.tokens_NT)
    assert torch.equal(data.take(3).tokens_NT, data.tokens_NT[:3])
    assert data.take(3).source.chosen == data.source.chosen[:3]


def test_prompts_are_filled_up_on_the_right(byte_tokenizer: Tokenizer) -> None:
    data = TextData.from_prompts(["abc", "a", "ab"], byte_tokenizer)
    first, last = data.batches(2)
    assert data.mask_NT is not None
    assert data.mask_NT.sum(1).tolist() == [3, 1, 2]
    assert first.tokens_BT.tolist() == [[97, 98, 99], [97, 0, 0]]
    assert first.mask_BT is not None
    assert first.mask_BT.tolist() == [[True] * 3, [True, False, False]]
    assert last.tokens_BT.tolist() == [[97, 98]]
    assert last.mask_BT is None


def test_default_text_needs_nothing(word_tokenizer: Tokenizer) -> None:
    calibration = text_blocks("default", word_tokenizer, length=256, blocks=16)
    verification = text_blocks("default", word_tokenizer, length=256, split="verification")
    assert calibration.tokens_NT.shape == (16, 256)
    assert len(verification) > 100
    assert verification.source.to_json()["where"] == "default"


def test_default_text_is_the_same_each_time(word_tokenizer: Tokenizer) -> None:
    first, second = (text_blocks("default", word_tokenizer, blocks=4) for _ in range(2))
    assert first.source == second.source
    assert torch.equal(first.tokens_NT, second.tokens_NT)


def test_short_text_says_how_much_there_is_and_how_much_is_needed(byte_tokenizer: Tokenizer) -> None:
    with pytest.raises(BadData, match=r"has 10 tokens\n  expected: at least 512 tokens"):
        TextData.from_text("ten bytes!", byte_tokenizer)
    with pytest.raises(BadData, match="at least 32 tokens, for 4"):
        TextData.from_text("ten bytes!", byte_tokenizer, length=8, blocks=4)


def test_bad_input_is_refused(byte_tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(BadData, match="empty text"):
        TextData.from_text(" \n ", byte_tokenizer)
    with pytest.raises(BadOption, match="split='test'"):
        text_blocks("default", byte_tokenizer, split="test")  # type: ignore[arg-type]
    with pytest.raises(BadOption, match="length=1"):
        text_blocks("default", byte_tokenizer, length=1)
    with pytest.raises(BadOption, match="batch size of 0"):
        list(TextData.from_text(TEXT, byte_tokenizer).batches(0))
    with pytest.raises(BadData, match="without tokens"):
        TextData.from_prompts(["a", ""], byte_tokenizer)


def test_blocks_must_hold_more_than_special_tokens(framed_tokenizer: Tokenizer) -> None:
    with pytest.raises(BadOption, match="more than the 2 special tokens"):
        TextData.from_text(TEXT, framed_tokenizer, length=2)
