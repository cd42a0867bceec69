"""Verification compares with a float64 loop, and says nothing it has not measured."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import layerwise as lw
from layerwise.allocate.plan import Edit, Plan
from layerwise.data import metrics
from layerwise.data.tasks import ChoiceItem, MultipleChoice
from layerwise.data.text import Source, TextData
from layerwise.errors import BadData, BadOption
from layerwise.report.verify import compare_on, verify
from layerwise.stack import DecoderStack, ModuleStack
from layerwise.testing.stacks import random_stack


def text(split: str = "verification", blocks: int = 6, length: int = 24) -> TextData:
    generator = torch.Generator().manual_seed(1)
    tokens_NT = torch.randint(97, (blocks, length), generator=generator)
    return TextData(tokens_NT, "random", Source("random", split, "", blocks * length, tuple(range(blocks))))


@pytest.fixture(scope="module")
def before() -> DecoderStack:
    return random_stack()


@pytest.fixture(scope="module")
def after(before: DecoderStack) -> DecoderStack:
    """Layer 1 dropped, layer 2 at four bits."""
    edits = (Edit(1, "drop", {"part": "layer"}), Edit(2, "quantize", {"bits": 4}))
    return lw.apply(before, Plan(before.spec.fingerprint(), len(before), edits))


@pytest.fixture(scope="module")
def report(before: DecoderStack, after: DecoderStack) -> lw.Report:
    return verify(before, after, text(), speeds=False)


def test_perplexity_and_divergence_match_a_float64_loop(
    before: DecoderStack, after: DecoderStack, report: lw.Report
) -> None:
    losses: dict[str, list[float]] = {"a": [], "b": [], "kl": [], "same": []}
    for row_T in text().tokens_NT:
        p_TV = before(row_T[None])[0].double().log_softmax(-1)
        q_TV = after(row_T[None])[0].double().log_softmax(-1)
        for place in range(len(row_T)):
            losses["kl"].append(float((p_TV[place].exp() * (p_TV[place] - q_TV[place])).sum()))
            losses["same"].append(float(p_TV[place].argmax() == q_TV[place].argmax()))
            if place + 1 < len(row_T):
                losses["a"].append(-float(p_TV[place, row_T[place + 1]]))
                losses["b"].append(-float(q_TV[place, row_T[place + 1]]))
    mean = {name: float(np.mean(values)) for name, values in losses.items()}
    assert report.before.perplexity == pytest.approx(math.exp(mean["a"]), rel=1e-5)
    assert report.after.perplexity == pytest.approx(math.exp(mean["b"]), rel=1e-5)
    assert report.log_perplexity_change.value == pytest.approx(mean["b"] - mean["a"], abs=1e-5)
    assert report.kl.value == pytest.approx(mean["kl"], rel=1e-4)
    assert report.agreement.value == pytest.approx(mean["same"])


def test_a_model_against_itself_has_no_difference(before: DecoderStack) -> None:
    report = verify(before, before, text(), speeds=False)
    change = report.log_perplexity_change
    assert (change.low, change.value, change.high) == (0, 0, 0)
    assert report.kl.value == pytest.approx(0, abs=1e-6) and report.agreement.low == 1


def test_padding_does_not_count(before: DecoderStack, after: DecoderStack) -> None:
    plain = text(length=16)
    mask_NT = torch.zeros(6, 20, dtype=torch.bool)
    mask_NT[:, :16] = True
    padded = TextData(torch.nn.functional.pad(plain.tokens_NT, (0, 4)), "random", plain.source, mask_NT)
    one, two = compare_on(before, after, plain), compare_on(before, after, padded)
    np.testing.assert_allclose(one.after.sum_N, two.after.sum_N, rtol=1e-5)
    np.testing.assert_allclose(one.kl_N, two.kl_N, rtol=1e-3)


def test_logits_made_some_at_a_time_do_not_change_what_is_found(before: DecoderStack, after: DecoderStack,
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    whole = compare_on(before, after, text(length=16))
    monkeypatch.setattr(metrics, "LOGITS", 5 * before.spec.vocabulary)
    monkeypatch.setattr(metrics, "CHUNK", 2 * before.spec.vocabulary)
    parts = compare_on(before, after, text(length=16))
    np.testing.assert_allclose(parts.before.sum_N, whole.before.sum_N, rtol=1e-5)
    np.testing.assert_allclose(parts.after.sum_N, whole.after.sum_N, rtol=1e-5)
    np.testing.assert_allclose(parts.kl_N, whole.kl_N, rtol=1e-4)
    np.testing.assert_array_equal(parts.same_N, whole.same_N)


def test_layers_are_told_by_their_place_in_the_original(report: lw.Report) -> None:
    assert [change.got for change in report.layers] == [
        "as it was",
        "dropped",
        "4 bits",
        "as it was",
        "as it was",
    ]


def test_sizes_are_those_of_the_tables(before: DecoderStack, after: DecoderStack, report: lw.Report) -> None:
    assert (report.before.bytes, report.after.bytes) == (before.spec.bytes(), after.spec.bytes())
    assert report.after.parameters == after.spec.parameters()


def test_what_was_not_measured_is_none_with_a_reason(report: lw.Report) -> None:
    assert report.before.decode_tokens_per_s is None and report.before.notes == ("not asked for",)


def test_calibration_text_is_pointed_out(before: DecoderStack) -> None:
    assert verify(before, before, text(), speeds=False).notes == ()
    (note,) = verify(before, before, text("calibration"), speeds=False).notes
    assert "looks better than it is" in note


def test_tasks_are_compared_item_by_item(before: DecoderStack, after: DecoderStack) -> None:
    class Letters:
        def encode(self, text: str) -> list[int]:
            return [ord(letter) % 97 for letter in text]

    items = tuple(ChoiceItem(f"question {index}:", (" yes", " no"), index % 2) for index in range(8))
    before.tokenizer = Letters()  # type: ignore[assignment]
    try:
        found = verify(before, after, text(), tasks=[MultipleChoice("yes-or-no", items, "made up")], speeds=False)
    finally:
        before.tokenizer = None
    result = found.tasks["yes-or-no"]
    assert result.change.value == pytest.approx(result.after - result.before)
    assert result.chance == 0.5


def test_modules_that_give_logits_can_be_verified() -> None:
    class Net(torch.nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            torch.manual_seed(seed)
            self.embedding = torch.nn.Embedding(97, 8)
            self.layers = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(3))
            self.head = torch.nn.Linear(8, 97)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.embedding(x)
            for layer in self.layers:
                x = x + layer(x).tanh()
            return self.head(x)

    report = verify(ModuleStack(Net(0).eval()), ModuleStack(Net(1).eval()), text())
    assert report.kl.value > 0
    assert report.before.peak_memory_bytes is None and "module of this process" in report.before.notes[0]


def test_modules_without_logits_are_refused() -> None:
    module = torch.nn.Sequential(torch.nn.Embedding(97, 4), *[torch.nn.Linear(4, 4) for _ in range(3)])
    chopped = ModuleStack(torch.nn.Sequential(module, torch.nn.Flatten()).eval())
    with pytest.raises(BadOption, match="logits"):
        verify(chopped, chopped, text())


def test_other_vocabularies_are_refused(before: DecoderStack) -> None:
    with pytest.raises(BadOption, match="97 and 50 tokens"):
        verify(before, random_stack(vocabulary=50), text())


def test_text_without_a_tokenizer_is_refused(before: DecoderStack) -> None:
    with pytest.raises(BadData, match="no tokenizer"):
        verify(before, before, "default")


def test_losses_that_are_not_finite_name_the_block(before: DecoderStack) -> None:
    with before.edit(1, "output", lambda x: x * float("nan")), pytest.raises(BadData, match="block 0"):
        compare_on(before, before, text())
