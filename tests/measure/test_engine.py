"""`measure`: forms of data, other modules, what is refused, and where results came from."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import layerwise as lw
from layerwise.data.batch import Batch
from layerwise.data.text import TextData
from layerwise.errors import BadData, BadModel, BadOption, UnknownName
from layerwise.measure import INSTRUMENTS
from layerwise.measure.base import Forward, PerLayer
from layerwise.measure.engine import measure, names
from layerwise.stack.decoder import DecoderStack
from layerwise.stack.module import ModuleStack
from layerwise.stack.open import open


class Letters:
    def encode(self, text: str) -> list[int]:
        return [ord(letter) % 97 for letter in text]


def forms(tokens_NT: Tensor) -> dict[str, Any]:
    mask_NT = torch.ones_like(tokens_NT)
    return {
        "tensor": tokens_NT,
        "tensors": [tokens_NT[:2], tokens_NT[2:]],
        "iterator": iter([tokens_NT[:2], tokens_NT[2:]]),
        "batches": [Batch(tokens_NT)],
        "mappings": [{"input_ids": tokens_NT, "attention_mask": mask_NT}],
        "pairs": [(tokens_NT, mask_NT)],
    }


@pytest.mark.parametrize("form", list(forms(torch.zeros(3, 2))))
def test_any_form_of_tokens(stack: DecoderStack, tokens_NT: Tensor, form: str) -> None:
    wanted = ["block-influence", "leave-one-out"]
    expected = measure(stack, tokens_NT, wanted, progress=False)
    found = measure(stack, forms(tokens_NT)[form], wanted, progress=False)
    for name in wanted:
        assert found[name].values == pytest.approx(expected[name].values, abs=2e-6)


def test_text(stack: DecoderStack) -> None:
    data = TextData.from_prompts(["one prompt", "another that is longer"], Letters())
    scores = lw.measure(stack, data, ["block-influence", "logit-lens-kl"], progress=False)
    assert scores.provenance["data"] == "prompts"
    assert scores.provenance["tokens"] == 32
    assert not any(math.isnan(value) for value in scores["logit-lens-kl"].values)


def test_results_survive_a_file(stack: DecoderStack, tokens_NT: Tensor, tmp_path: Path) -> None:
    scores = measure(stack, tokens_NT, ["zd", "lim"], seed=3, progress=False)
    assert lw.Scores.load(scores.save(tmp_path / "scores.json")) == scores
    assert [entry["name"] for entry in scores.provenance["instruments"]] == ["zd", "lim"]
    assert scores.provenance["seed"] == 3


def test_the_model_is_known_by_its_weights(stack: DecoderStack, tmp_path: Path) -> None:
    first = measure(stack, None, "weight-l1", progress=False).model
    stack.save(tmp_path / "model")
    for stream in (False, True):
        again = open(tmp_path / "model", stream=stream)
        assert measure(again, None, "weight-l2", progress=False).model == first
    other = stack.copied()
    with torch.no_grad():
        next(other.decoder.layers[3].parameters()).mul_(1.01)
    assert measure(other, None, "weight-l1", progress=False).model != first


def test_a_streamed_model_is_read_once_for_everything(stack: DecoderStack, tokens_NT: Tensor, tmp_path: Path,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    stack.save(tmp_path / "model")
    streamed = open(tmp_path / "model", stream=True)
    monkeypatch.setattr("layerwise.measure.engine.identity", lambda _: "")
    reads = []
    layer = streamed._weights.layer  # type: ignore[attr-defined]
    monkeypatch.setattr(streamed._weights, "layer", lambda index: reads.append(index) or layer(index))  # type: ignore[attr-defined]
    measure(streamed, tokens_NT, [*names(Forward), "weight-l1", "zd"], batch=2, progress=False)
    assert reads == [0, 1, 2, 3]


def test_names_by_kind() -> None:
    assert {"block-influence", "logit-lens-kl"} <= set(names(Forward))
    assert {"weight-l1", "cost"} <= set(names(PerLayer))
    assert not set(names(Forward)) & set(names(PerLayer))


# what is refused -----------------------------------------------------------------------------------


def test_an_unknown_instrument_names_near_ones(stack: DecoderStack) -> None:
    with pytest.raises(UnknownName, match="block-influence"):
        measure(stack, None, ["block-influense"])


@pytest.mark.parametrize("instruments", [[], ["zd", "zd"]])
def test_nothing_or_the_same_twice(stack: DecoderStack, instruments: list[str]) -> None:
    with pytest.raises(BadOption, match="instruments"):
        measure(stack, None, instruments)


@pytest.mark.parametrize("data", [None, [], torch.zeros(0, 4, dtype=torch.int64), [torch.zeros(2, 3)],
                                  torch.full((1, 4), 97), ["text"]])
def test_no_data_or_not_the_models(stack: DecoderStack, data: Any) -> None:
    with pytest.raises(BadData):
        measure(stack, data, "block-influence", progress=False)


def test_broken_embeddings_are_named(stack: DecoderStack, tokens_NT: Tensor) -> None:
    broken = stack.copied()
    with torch.no_grad():
        broken.decoder.embedding.weight[int(tokens_NT[3, 5])] = math.nan
    with pytest.raises(BadModel, match=r"entering layer 0 .* batch 1"):
        measure(broken, tokens_NT, "lim", batch=2, progress=False)


# other modules -------------------------------------------------------------------------------------


class Residual(nn.Module):
    """Changes its input in place after use, as networks do."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu_(self.linear(x)).add_(x)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Residual(6) for _ in range(3))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = torch.sin(input_ids[..., None] * torch.arange(1, 7))
        for layer in self.layers:
            x = layer(x).mul_(0.5)  # what leaves a layer is not what enters the next
        return x.mean(1)


@pytest.fixture
def network() -> ModuleStack:
    torch.manual_seed(0)
    return ModuleStack(Network().eval())


def test_a_module_is_watched_as_it_runs(network: ModuleStack) -> None:
    ids = torch.randint(1, 9, (4, 5), generator=torch.Generator().manual_seed(0))
    found = measure(network, [ids[:2], ids[2:]], ["block-influence", "angular-distance"], progress=False)
    x, expected = torch.sin(ids[..., None] * torch.arange(1, 7)).double(), []
    for layer in copy.deepcopy(network.root).double().requires_grad_(False).layers:  # type: ignore[union-attr]
        y = x + torch.relu(layer.linear(x))
        expected.append(float((1 - torch.cosine_similarity(x, y, -1)).mean()))
        x = 0.5 * y
    assert found["block-influence"].values == pytest.approx(expected, abs=1e-6)


def test_a_modules_padding_is_left_out(network: ModuleStack) -> None:
    ids = torch.tensor([[1, 2, 3]])
    padded = {"input_ids": torch.tensor([[1, 2, 3, 8, 8]]), "attention_mask": torch.tensor([[1, 1, 1, 0, 0]])}
    expected = measure(network, [ids], "block-influence", progress=False)["block-influence"].values
    found = measure(network, [padded], "block-influence", progress=False)["block-influence"].values
    assert found == pytest.approx(expected, abs=1e-7)


def test_places_of_a_picture_are_tokens() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(*(nn.Conv2d(3, 3, 3, padding=1) for _ in range(4)))
    x = torch.randn(2, 3, 8, 8)
    found = measure(ModuleStack(module), [x], "block-influence", progress=False)
    expected = []
    for layer in module.requires_grad_(False):
        expected.append(float((1 - torch.cosine_similarity(x, layer(x), 1)).mean()))
        x = layer(x)
    assert found["block-influence"].values == pytest.approx(expected, abs=1e-6)


def test_a_layer_that_changes_the_width_is_not_comparable() -> None:
    class Wide(nn.Module):
        def __init__(self, inputs: int, outputs: int) -> None:
            super().__init__()
            self.linear = nn.Linear(inputs, outputs)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x)  # type: ignore[no-any-return]

    stack = ModuleStack(nn.Sequential(Wide(4, 4), Wide(4, 6), Wide(6, 6)))
    found = measure(stack, [torch.randn(3, 4)], ["block-influence", "weight-l1"], progress=False)
    assert [math.isnan(value) for value in found["block-influence"].values] == [False, True, False]
    assert not any(math.isnan(value) for value in found["weight-l1"].values)


@pytest.mark.parametrize("name", ["logit-lens-kl", "response", "relative-contribution"])
def test_what_a_module_cannot_show_is_refused_before_anything_runs(name: str) -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3)))

        def forward(self, x: Tensor) -> Tensor:
            return self.layers(x)  # type: ignore[no-any-return]

    with pytest.raises(BadOption, match=name):
        measure(ModuleStack(Plain()), [torch.randn(2, 4)], name, progress=False)


def test_nan_in_a_module_names_the_layer(network: ModuleStack) -> None:
    with torch.no_grad():
        network.root.layers[1].linear.bias.fill_(math.inf)  # type: ignore[union-attr, operator]
    with pytest.raises(BadModel, match=r"after layer 1 .* batch 0"):
        measure(network, [torch.ones(1, 3)], "lim", progress=False)
    assert not any(layer._forward_hooks for layer in network.root.modules())


def test_every_registered_instrument_is_described() -> None:
    for name in INSTRUMENTS:
        kind = INSTRUMENTS[name]
        assert kind.name == name and kind.about and kind.__doc__
