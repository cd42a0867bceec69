"""What the family refuses, and what it says: no layers, no labels, one class, NaN, split answers, no memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import layerwise as lw
from layerwise.data.images import ImageData
from layerwise.data.labelled import loaded
from layerwise.data.prompts import single_token
from layerwise.errors import BadData, BadModel, BadOption
from layerwise.measure.block_influence import BlockInfluence
from layerwise.measure.criticality import Criticality
from layerwise.measure.engine import measure
from layerwise.measure.gradient_times_activation import GradientTimesActivation
from layerwise.measure.memory import enough_memory, out_of_memory
from layerwise.measure.perturbation import criticality, perturb
from layerwise.measure.separation import probe_scores
from layerwise.measure.specific_neurons import specificity
from layerwise.measure.taylor import Taylor
from layerwise.measure.tuned_lens import TunedLens
from layerwise.measure.weight_magnitude import WeightL1
from layerwise.nets.classifiers import mlp
from layerwise.stack.decoder import DecoderStack
from layerwise.stack.module import ModuleStack
from layerwise.stack.perturb import parts, zero
from layerwise.transform.moments import moments

# layers and labels ----------------------------------------------------------------------------------


def test_a_module_without_repeated_blocks_says_how_to_name_them() -> None:
    with pytest.raises(BadModel, match="no layers are found") as error:
        lw.open(nn.Linear(4, 4))
    assert "blocks=" in error.value.do


def test_data_that_a_module_cannot_read_is_named_before_anything_is_measured() -> None:
    with pytest.raises(BadData, match=r"first batch \(\[2, 5\]\) on which Sequential fails: RuntimeError") as error:
        measure(ModuleStack(mlp((4, 4, 4, 2))), [torch.randn(2, 5)], "block-influence", progress=False)
    assert "Python" in error.value.do


def test_pictures_without_labels_where_labels_are_needed(tmp_path: Path) -> None:
    picture = pytest.importorskip("PIL.Image")
    picture.new("RGB", (8, 8)).save(tmp_path / "one.png")
    with pytest.raises(BadData, match="label"):
        loaded(ImageData.from_folder(tmp_path))


def test_a_probe_needs_two_classes() -> None:
    with pytest.raises(BadData, match="single class"):
        probe_scores(torch.randn(6, 3), torch.ones(6, dtype=torch.bool), torch.randn(2, 3))


def test_neurons_of_one_category_have_nothing_to_differ_from() -> None:
    with pytest.raises(BadData, match="1 category"):
        specificity([None])  # type: ignore[list-item]


def test_the_probability_of_a_single_class_says_nothing() -> None:
    net = mlp((4, 4, 4, 1))
    with pytest.raises(BadModel, match="single class"):
        perturb(ModuleStack(net), [torch.randn(3, 4)], {"zero": zero}, {"criticality": criticality}, parts(net))


class Letters:
    def encode(self, text: str) -> list[int]:
        return list(text.encode())


def test_an_answer_that_the_tokenizer_splits() -> None:
    with pytest.raises(BadData, match="splits into 6"):
        single_token(Letters(), " Paris")


# not a number ---------------------------------------------------------------------------------------


@pytest.fixture
def broken(stack: DecoderStack) -> DecoderStack:
    """One weight of layer 2 is NaN."""
    twin = stack.copied()
    with torch.no_grad():
        twin.block(2).matrix("down").weight[0, 0] = math.nan  # type: ignore[operator]
    return twin


@pytest.mark.parametrize("name", ["block-influence", "leave-one-out", "utilized-rank", "criticality"])
def test_nan_names_the_layer_and_the_first_batch(broken: DecoderStack, tokens_NT: Tensor, name: str) -> None:
    with pytest.raises(BadModel, match=r"after layer 2 .* batch 0"):
        measure(broken, tokens_NT, name, batch=2, progress=False)


def test_nan_gradients_name_the_layer_and_the_batch(broken: DecoderStack, tokens_NT: Tensor) -> None:
    with pytest.raises(BadModel, match=r"layer \d.* batch 0"):
        measure(broken, tokens_NT, "taylor", batch=2, progress=False)


def test_nan_that_enters_a_matrix_names_it_and_the_batch() -> None:
    net = mlp((3, 3, 2))
    batches = [torch.ones(2, 3), torch.full((2, 3), math.nan)]
    with pytest.raises(BadModel, match=r"enters 0 .* batch 1"):
        moments({"0": net[0]}, lambda: [net(x) for x in batches])


# memory ---------------------------------------------------------------------------------------------

EXHAUSTED = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried"),
    MemoryError(),
]


def failing(error: Exception) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


@pytest.mark.parametrize("error", EXHAUSTED, ids=lambda error: type(error).__name__)
def test_what_counts_as_out_of_memory(error: Exception) -> None:
    assert out_of_memory(error)
    assert not out_of_memory(RuntimeError("sizes do not match"))


@pytest.mark.parametrize("error", EXHAUSTED, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize(("kind", "method", "name"), [
    (BlockInfluence, "update", "block-influence"), (WeightL1, "of", "weight-l1"), (Taylor, "of", "taylor"),
    (GradientTimesActivation, "values", "gradient-times-activation"), (TunedLens, "walk", "tuned-lens"),
    (Criticality, "score", "criticality"),
])
def test_the_instrument_to_drop_is_named(stack: DecoderStack, tokens_NT: Tensor, monkeypatch: pytest.MonkeyPatch,
                                         kind: type, method: str, name: str, error: Exception) -> None:
    monkeypatch.setattr(kind, method, failing(error))
    with pytest.raises(BadOption, match="memory ran out") as raised:
        measure(stack, tokens_NT, ["lim", name], progress=False)
    assert f"leave out {name!r}" in raised.value.do and "stream=True" in raised.value.do


def test_layers_that_do_not_fit_are_streamed(stack: DecoderStack, tokens_NT: Tensor, tmp_path: Path,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    stack.save(tmp_path / "model")
    monkeypatch.setattr(DecoderStack, "run", failing(EXHAUSTED[1]))
    with pytest.raises(BadOption, match="running the layers") as raised:
        measure(stack, tokens_NT, "lim", progress=False)
    assert "stream=True" in raised.value.do and "leave out" not in raised.value.do
    streamed = lw.open(tmp_path / "model", stream=True)
    with pytest.raises(BadOption, match="memory ran out") as raised:
        measure(streamed, tokens_NT, "lim", progress=False)
    assert "stream=True" not in raised.value.do and "batch=1" in raised.value.do


def test_other_errors_pass(stack: DecoderStack) -> None:
    with pytest.raises(RuntimeError, match="sizes"), enough_memory(stack, "measuring"):
        raise RuntimeError("sizes do not match")
