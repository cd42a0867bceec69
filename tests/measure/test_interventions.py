"""Trials along cached prefixes: equal to starting over each time, half the work, and resumable."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from layerwise.errors import BadData, BadModel, BadOption
from layerwise.measure.base import Trial
from layerwise.measure.engine import measure
from layerwise.measure.leave_one_out import LeaveOneOut
from layerwise.measure.quantization_sensitivity import QuantizationSensitivity
from layerwise.stack.decoder import DecoderStack
from layerwise.testing.stacks import random_stack
from layerwise.transform.quantize import Quantize, pack_table


def loss(stack: DecoderStack, tokens_NT: Tensor) -> float:
    logits_NTV = stack(tokens_NT).double()
    return float(F.cross_entropy(logits_NTV[:, :-1].flatten(0, 1), tokens_NT[:, 1:].flatten()))


def kl(original_NTV: Tensor, changed_NTV: Tensor) -> float:
    """Over all positions with a next token."""
    p, q = (logits[:, :-1].double().log_softmax(-1) for logits in (original_NTV, changed_NTV))
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_leave_one_out_equals_starting_over(stack: DecoderStack, tokens_NT: Tensor) -> None:
    expected = []
    for layer in range(len(stack)):
        with stack.skip(layer):
            expected.append(loss(stack, tokens_NT))
    found = measure(stack, tokens_NT, LeaveOneOut(tokens=None), batch=2, progress=False)["leave-one-out"]
    assert found.values == pytest.approx([value - loss(stack, tokens_NT) for value in expected], abs=2e-6)


def test_sensitivity_equals_starting_over(stack: DecoderStack, tokens_NT: Tensor) -> None:
    instrument = QuantizationSensitivity(bits=(4, 2), tokens=None)
    found = measure(stack, tokens_NT, instrument, batch=2, progress=False)
    original_NTV = stack(tokens_NT)
    for bits in (4, 2):
        column = found[f"quantization-sensitivity:{bits}"]
        for layer, row in enumerate(stack.spec.rows):
            with stack.swap(layer, Quantize(bits).apply(stack.block(layer), row)):
                assert column.values[layer] == pytest.approx(kl(original_NTV, stack(tokens_NT)), rel=1e-4)
        table = pack_table(stack.decoder.embedding.weight, Quantize(bits).format)
        blocks = [stack.block(layer) for layer in range(len(stack))]
        changed_NTV = stack.rebuilt(stack.spec, blocks, embedding=table)(tokens_NT)
        assert column.outside == {"embedding": pytest.approx(kl(original_NTV, changed_NTV), rel=1e-4)}


def test_sensitivity_of_each_matrix_as_loss(stack: DecoderStack, tokens_NT: Tensor) -> None:
    instrument = QuantizationSensitivity(bits=(2,), per="matrix", metric="loss", tokens=None)
    found = measure(stack, tokens_NT, instrument, progress=False)
    assert list(found.columns) == [f"quantization-sensitivity:{name}:2"
                                   for name in ("q", "k", "v", "o", "gate", "up", "down")]
    for name in ("k", "down"):
        packed = Quantize(2, matrices=(name,)).apply(stack.block(1), stack.spec.rows[1])
        with stack.swap(1, packed):
            changed = loss(stack, tokens_NT)
        expected = changed - loss(stack, tokens_NT)
        assert found[f"quantization-sensitivity:{name}:2"].values[1] == pytest.approx(expected, abs=2e-6)


def test_prefixes_run_once(stack: DecoderStack, tokens_NT: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    run = DecoderStack.run

    def counted(self: DecoderStack, state: object, layers: slice = slice(None)) -> object:
        runs.append(layers.stop - layers.start)
        return run(self, state, layers)  # type: ignore[arg-type]

    monkeypatch.setattr(DecoderStack, "run", counted)
    measure(stack, tokens_NT, "leave-one-out", batch=5, progress=False)
    layers = len(stack)
    trials = layers * (layers + 1) // 2  # a skipped layer counts as run
    assert sum(runs) == layers + trials + layers  # the original, the trials, the walk


def test_a_sample_of_positions_is_seeded_and_paired(stack: DecoderStack, tokens_NT: Tensor) -> None:
    def values(seed: int, batch: int) -> tuple[float, ...]:
        return measure(stack, tokens_NT, LeaveOneOut(tokens=3), seed=seed, batch=batch,
                       progress=False)["leave-one-out"].values

    assert values(0, 2) == pytest.approx(values(0, 5), abs=2e-6)
    assert values(0, 2) != values(1, 2)


class Killed(Exception):
    pass


def test_a_killed_sweep_continues_where_it_was(stack: DecoderStack, tokens_NT: Tensor, tmp_path: Path,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    instrument = QuantizationSensitivity(bits=(8, 3))
    whole = measure(stack, tokens_NT, instrument, batch=2, progress=False)
    score, calls = QuantizationSensitivity.score, iter(range(100))

    def dies(self: QuantizationSensitivity, *args: object) -> float:
        if next(calls) == 5:
            raise Killed
        return score(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(QuantizationSensitivity, "score", dies)
    path = tmp_path / "run" / "trials.jsonl"
    with pytest.raises(Killed):
        measure(stack, tokens_NT, instrument, batch=2, progress=False, resume=path)
    resumed = measure(stack, tokens_NT, instrument, batch=2, progress=False, resume=path)
    assert resumed.columns == whole.columns
    assert next(calls) == 6 + (10 - 5)  # 8 layer trials and 2 of the embedding, 5 of them before the kill


def test_another_seed_or_model_shares_nothing(stack: DecoderStack, tokens_NT: Tensor, tmp_path: Path) -> None:
    path = tmp_path / "trials.jsonl"
    for seed in (0, 1):
        measure(stack, tokens_NT, "leave-one-out", seed=seed, progress=False, resume=path)
    other = stack.copied()
    with torch.no_grad():
        next(other.decoder.layers[2].parameters()).mul_(1.5)
    measure(other, tokens_NT, "leave-one-out", progress=False, resume=path)
    lines = [line for line in path.read_text().splitlines() if line]
    assert len(lines) == len(set(lines)) == 3 * len(stack)


def test_a_hopeless_alternative_is_infinitely_bad(stack: DecoderStack, tokens_NT: Tensor,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LeaveOneOut, "score", lambda *_: math.nan)
    found = measure(stack, tokens_NT, "leave-one-out", progress=False)["leave-one-out"]
    assert found.values == (math.inf,) * 4


def test_texts_of_one_token(stack: DecoderStack) -> None:
    with pytest.raises(BadData, match="one token"):
        measure(stack, torch.zeros(3, 1, dtype=torch.int64), "leave-one-out", progress=False)


def test_a_broken_original(stack: DecoderStack, tokens_NT: Tensor) -> None:
    broken = stack.copied()
    with torch.no_grad():
        broken.decoder.norm.weight.fill_(math.nan)
    with pytest.raises(BadModel, match="loss of random"):
        measure(broken, tokens_NT, "leave-one-out", progress=False)


@pytest.mark.parametrize("options", [{"bits": (7,)}, {"bits": ()}, {"per": "row"}, {"metric": "mse"},
                                     {"method": "gptq"}])
def test_impossible_options(options: dict[str, object]) -> None:
    with pytest.raises(BadOption, match="quantization-sensitivity"):
        QuantizationSensitivity(**options)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def _nothing_stays_swapped(stack: DecoderStack) -> Iterator[None]:
    yield
    assert not stack._swapped


def test_the_floor_of_rounding_is_interpolated_and_subtracted() -> None:
    found = {Trial(0, "floor"): 0.4, Trial(2, "floor"): 0.2, Trial("embedding", "4"): 0.5, Trial("head", "4"): 0.5}
    found |= {Trial(layer, "4"): 0.35 for layer in range(3)}
    column, floor = QuantizationSensitivity(bits=(4,)).finish(3, found)
    assert floor.name == "quantization-sensitivity:floor" and floor.important is None
    assert floor.values == pytest.approx([0.4, 0.3, 0.2])
    assert column.values == pytest.approx([0, 0.05, 0.15])
    assert column.outside == pytest.approx({"embedding": 0.1, "head": 0.5})


def sensitivity(stack: DecoderStack, tokens_NT: Tensor) -> float:
    """Plain KL of 8-bit layers, summed over layers."""
    original_NTV, total = stack(tokens_NT), 0.0
    for layer, row in enumerate(stack.spec.rows):
        with stack.swap(layer, Quantize(8, group=32).apply(stack.block(layer), row)):
            total += kl(original_NTV, stack(tokens_NT))
    return total


def test_in_bfloat16_what_rounding_alone_does_is_mostly_taken_out() -> None:
    tokens_NT = torch.randint(97, (20, 16), generator=torch.Generator().manual_seed(1))
    stack = random_stack(8, dtype="bfloat16")
    instrument = QuantizationSensitivity(bits=(8,), group=32, tokens=None, outside=False)
    found = sum(measure(stack, tokens_NT, instrument, progress=False)["quantization-sensitivity:8"].values)
    exact, raw = sensitivity(stack.copied(torch.float32), tokens_NT), sensitivity(stack, tokens_NT)
    assert raw > 2 * exact
    assert abs(found - exact) < 0.5 * abs(raw - exact)
