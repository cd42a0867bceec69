"""Losses equal a plain float64 calculation, whatever the chunks."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from layerwise.data import TextData, agreement, block_losses, kl_divergence, metrics, perplexity, token_losses
from layerwise.data.metrics import hidden_losses, token_kl
from layerwise.data.text import Tokenizer
from layerwise.errors import BadData

B, T, V = 3, 7, 11


@pytest.fixture
def random() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def reference_losses(logits_BTV: Tensor, tokens_BT: Tensor) -> list[list[float]]:
    """Loops in float64."""
    rows = []
    for logits_TV, tokens_T in zip(logits_BTV.double().tolist(), tokens_BT.tolist(), strict=True):
        rows.append([math.log(sum(map(math.exp, logits_TV[t]))) - logits_TV[t][tokens_T[t + 1]]
                     for t in range(len(tokens_T) - 1)])
    return rows


@pytest.mark.parametrize("chunk", [1, 3 * V, 2**24])
def test_token_losses_match_a_float64_loop(chunk: int, random: torch.Generator,
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "CHUNK", chunk)
    logits_BTV = 3 * torch.randn(B, T, V, generator=random)
    tokens_BT = torch.randint(V, (B, T), generator=random)
    expected = torch.tensor(reference_losses(logits_BTV, tokens_BT))
    torch.testing.assert_close(token_losses(logits_BTV, tokens_BT), expected)


@pytest.mark.parametrize(("logits", "chunk"), [(2**24, 2**22), (5 * V, 2 * V), (V, 3 * V), (1, 1)])
def test_losses_through_a_head_equal_losses_of_its_logits(logits: int, chunk: int, random: torch.Generator,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "LOGITS", logits)
    monkeypatch.setattr(metrics, "CHUNK", chunk)
    hidden_BTC, head_VC = torch.randn(B, T, 4, generator=random), torch.randn(V, 4, generator=random)
    tokens_BT = torch.randint(V, (B, T), generator=random)
    through = hidden_losses(hidden_BTC, tokens_BT, lambda rows_PC: rows_PC @ head_VC.T, V)
    torch.testing.assert_close(through, token_losses(hidden_BTC @ head_VC.T, tokens_BT))


def test_low_precision_logits_are_summed_in_float32(random: torch.Generator) -> None:
    logits_BTV = torch.randn(1, 4, 5000, generator=random).bfloat16()
    tokens_BT = torch.randint(5000, (1, 4), generator=random)
    exact = token_losses(logits_BTV.float(), tokens_BT)
    torch.testing.assert_close(token_losses(logits_BTV, tokens_BT), exact)


def test_perplexity_of_guessing_is_the_vocabulary(byte_tokenizer: Tokenizer) -> None:
    data = TextData.from_text("some text " * 50, byte_tokenizer, length=32)
    found = perplexity(lambda tokens_BT: torch.zeros(*tokens_BT.shape, 256), data)
    assert found.perplexity == pytest.approx(256)
    assert found.tokens_N.tolist() == [31.0] * len(data)
    assert found.interval().value == pytest.approx(256)


def test_perplexity_is_weighted_by_tokens_and_leaves_filling_out(byte_tokenizer: Tokenizer) -> None:
    data = TextData.from_prompts(["abcde", "xy", "pqr"], byte_tokenizer)
    loss_of = {5: 1.0, 2: 3.0, 3: 2.0}

    def losses(tokens_BT: Tensor) -> Tensor:
        loss_B = torch.tensor([loss_of[length] for length in (tokens_BT > 0).sum(1).tolist()])
        return loss_B[:, None].where(tokens_BT[:, 1:] > 0, torch.nan)

    found = block_losses(losses, data, size=3)
    assert found.tokens_N.tolist() == [4, 1, 2]
    assert found.sum_N.tolist() == [4, 3, 4]
    assert found.mean == pytest.approx(11 / 7)


def test_batch_size_does_not_matter(byte_tokenizer: Tokenizer, random: torch.Generator) -> None:
    data = TextData.from_text("a longer text to predict. " * 20, byte_tokenizer, length=16)
    table_VV = torch.randn(256, 256, generator=random)
    one, all_ = (perplexity(lambda tokens_BT: table_VV[tokens_BT], data, size) for size in (1, 100))
    np.testing.assert_allclose(one.sum_N, all_.sum_N, rtol=1e-6)


def test_change_is_a_ratio_of_perplexities(byte_tokenizer: Tokenizer, random: torch.Generator) -> None:
    data = TextData.from_text("a longer text to predict. " * 40, byte_tokenizer, length=16)
    table_VV = torch.randn(256, 256, generator=random)
    before = perplexity(lambda tokens_BT: table_VV[tokens_BT], data)
    after = perplexity(lambda tokens_BT: 1.1 * table_VV[tokens_BT], data)
    change = before.change(after)
    assert change.value == pytest.approx(after.perplexity / before.perplexity)
    assert change.low <= change.value <= change.high
    same = before.change(before)
    assert (same.low, same.value, same.high) == (1.0, 1.0, 1.0)


def test_a_loss_that_is_not_finite_names_the_block(byte_tokenizer: Tokenizer) -> None:
    data = TextData.from_text("some text " * 50, byte_tokenizer, length=32)

    def losses(tokens_BT: Tensor) -> Tensor:
        out = torch.ones(len(tokens_BT), 31)
        out[-1, 5] = float("nan")
        return out

    with pytest.raises(BadData, match="block 3 of text is nan"):
        block_losses(losses, data)


@pytest.mark.parametrize("chunk", [1, 2**24])
def test_divergence_matches_float64(chunk: int, random: torch.Generator,
                                    monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "CHUNK", chunk)
    old, new = torch.randn(2, B, T, V, generator=random)
    p, q = old.double().softmax(-1), new.double().softmax(-1)
    expected_BT = (p * (p / q).log()).sum(-1)
    torch.testing.assert_close(token_kl(old, new).double(), expected_BT, rtol=1e-5, atol=1e-6)
    assert kl_divergence(old, new) == pytest.approx(float(expected_BT.mean()), rel=1e-5)
    mask_BT = torch.rand(B, T, generator=random) > 0.5
    assert kl_divergence(old, new, mask_BT) == pytest.approx(float(expected_BT[mask_BT].mean()), rel=1e-5)


def test_divergence_from_itself_is_zero_and_agreement_is_one(random: torch.Generator) -> None:
    logits_BTV = torch.randn(B, T, V, generator=random)
    assert kl_divergence(logits_BTV, logits_BTV) == 0
    assert agreement(logits_BTV, logits_BTV + 5) == 1
    assert agreement(logits_BTV, -logits_BTV) == 0
