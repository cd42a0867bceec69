"""Folders of other families open as the modules that transformers builds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from layerwise.errors import BadModel
from layerwise.measure.base import Forward
from layerwise.measure.engine import measure, names, supported
from layerwise.stack.foreign import foreign, open_foreign
from layerwise.testing.stacks import random_stack


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=3, num_attention_heads=2,
                        intermediate_size=32, max_position_embeddings=24)
    folder = tmp_path_factory.mktemp("bert") / "tiny"
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    config = ViTConfig(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32,
                       image_size=16, patch_size=8)
    folder = tmp_path_factory.mktemp("vit") / "tiny"
    ViTModel(config).save_pretrained(folder)
    return folder


def test_an_encoder_gives_what_transformers_gives(encoder: Path) -> None:
    from transformers import BertModel

    assert foreign(encoder) == encoder
    stack = open_foreign(encoder)
    assert len(stack) == 3 and stack.spec.context == 24 and stack.folder == encoder
    ids = torch.tensor([[1, 2, 3]])
    expected = BertModel.from_pretrained(encoder).eval()(ids).last_hidden_state
    assert torch.equal(stack(ids).last_hidden_state, expected)


def test_an_encoders_layers_are_measured_without_its_padding(encoder: Path) -> None:
    stack = open_foreign(encoder)
    wanted = supported(stack, names(Forward))
    assert {"block-influence", "manifold", "lim"} <= set(wanted)
    whole = [{"input_ids": torch.tensor([[1, 2, 3]]), "attention_mask": torch.ones(1, 3)}]
    padded = [{"input_ids": torch.tensor([[1, 2, 3, 0]]), "attention_mask": torch.tensor([[1, 1, 1, 0]])}]
    one, other = (measure(stack, data, "block-influence", progress=False) for data in (whole, padded))
    assert one["block-influence"].values == pytest.approx(other["block-influence"].values, abs=1e-6)


def test_a_vision_transformer_is_measured(picture: Path) -> None:
    stack = open_foreign(picture)
    assert len(stack) == 3 and stack.tokenizer is None
    pixels = torch.rand(4, 3, 16, 16)
    found = measure(stack, [{"pixel_values": pixels}], supported(stack, names(Forward)), progress=False)
    assert len(found["block-influence"].values) == 3


def test_a_convolutional_network_is_measured() -> None:
    from layerwise.nets.classifiers import ResNet
    from layerwise.stack.module import ModuleStack

    torch.manual_seed(0)
    stack = ModuleStack(ResNet(2, (4, 8)).eval())
    found = measure(stack, [torch.rand(4, 3, 12, 12)], supported(stack, names(Forward)), progress=False)
    assert len(found["block-influence"].values) == len(stack)


def test_our_own_families_and_other_places_are_not_foreign(tmp_path: Path) -> None:
    assert foreign(random_stack().save(tmp_path / "ours")) is None
    assert foreign("smollm2-nowhere") is None


def test_what_transformers_cannot_build_is_said(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no-such-type"}))
    with pytest.raises(BadModel, match="cannot build"):
        open_foreign(tmp_path)


def test_a_classifier_keeps_its_head_and_says_nothing_while_it_loads(tmp_path: Path,
                                                                    capfd: pytest.CaptureFixture[str]) -> None:
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32,
                       image_size=16, patch_size=8, num_labels=5)
    model = ViTForImageClassification(config).eval()
    model.save_pretrained(tmp_path / "classes")
    capfd.readouterr()
    stack = open_foreign(tmp_path / "classes")
    assert capfd.readouterr() == ("", "")
    pixels = torch.randn(4, 3, 16, 16)
    assert torch.equal(stack(pixels).logits, model(pixels).logits)
    scores = measure(stack, [(pixels, torch.tensor([0, 1, 2, 3]))], "leave-one-out", progress=False)
    assert all(value == value for value in scores["leave-one-out"].values)
