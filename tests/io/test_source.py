"""What a model can be opened from, and what is said about everything else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from layerwise.errors import BadFile, BadModel, BadOption
from layerwise.io.source import read
from layerwise.io.weights import build
from layerwise.nets.flow import Flow
from tests.nets.tiny import tiny, write


def configured(folder: Path, **changes: Any) -> Path:
    """The folder with entries of config.json replaced, or (None) taken away."""
    file = folder / "config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return folder


def renamed(folder: Path, rename: Callable[[str], str]) -> Path:
    file = folder / "model.safetensors"
    save_file({rename(name): tensor for name, tensor in load_file(file).items()}, file)
    return folder


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return write(tiny("llama"), tmp_path / "llama")


def logits(source: str | Path) -> torch.Tensor:
    with torch.inference_mode():
        return build(read(source).weights)(torch.arange(12)[None], Flow(torch.arange(12)[None]))


def test_a_folder(llama: Path) -> None:
    source = read(llama)
    assert (source.name, source.folder, source.tokenizer) == ("llama", llama, None)
    assert (source.spec.family, len(source.spec.rows), source.spec.dtype) == ("llama", 3, "float32")
    assert read(str(llama)).spec == source.spec


def test_a_tokenizer_is_found_and_knows_the_models_vocabulary(llama: Path) -> None:
    (llama / "tokenizer.json").write_text("{}")
    tokenizer = read(llama).tokenizer
    assert tokenizer is not None
    assert (tokenizer.folder, tokenizer.limit) == (llama, 131)


def test_sharded_folders(tmp_path: Path) -> None:
    model = tiny("llama")
    whole, shards = write(model, tmp_path / "whole"), write(model, tmp_path / "shards", max_shard_size="50KB")
    assert len(list(shards.glob("*.safetensors"))) > 2
    assert logits(shards).equal(logits(whole))


def test_gpt2_without_its_prefix(tmp_path: Path) -> None:
    folder = write(tiny("gpt2"), tmp_path / "gpt2")
    expected = logits(folder)
    assert logits(renamed(folder, lambda name: name.removeprefix("transformer."))).equal(expected)


@pytest.mark.parametrize("rename", [
    lambda name: f"language_model.{name}",
    lambda name: f"model.language_model.{name.removeprefix('model.')}",
])
def test_the_text_half_of_a_multimodal_gemma3(tmp_path: Path, rename: Callable[[str], str]) -> None:
    folder = write(tiny("gemma3"), tmp_path / "gemma3")
    expected = logits(folder)
    text = json.loads((folder / "config.json").read_text())
    whole = {"model_type": "gemma3", "text_config": text, "vision_config": {}, "dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(whole))
    assert logits(renamed(folder, rename)).equal(expected)


def test_a_configuration_without_dtype_takes_the_stored_one(llama: Path) -> None:
    file = llama / "model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(file).items()}, file)
    assert read(configured(llama, dtype=None)).spec.dtype == "bfloat16"


def test_an_older_spelling_of_the_rotation(tmp_path: Path) -> None:
    folder = write(tiny("llama-rope-llama3"), tmp_path / "llama")
    spec = read(folder).spec
    rope = json.loads((folder / "config.json").read_text())["rope_parameters"]
    theta = rope.pop("rope_theta")
    assert read(configured(folder, rope_parameters=None, rope_theta=theta, rope_scaling=rope)).spec == spec


def test_an_unknown_family_says_how_to_open_it(llama: Path) -> None:
    with pytest.raises(BadModel, match="type 'mamba'") as error:
        read(configured(llama, model_type="mamba"))
    assert "layerwise.open(transformers.AutoModel.from_pretrained(" in error.value.do


def test_weights_that_others_packed_are_refused(llama: Path) -> None:
    with pytest.raises(BadModel, match="packed by gptq"):
        read(configured(llama, quantization_config={"quant_method": "gptq"}))


@pytest.mark.parametrize("text", ["", "{", "[]", '"llama"', "\x00\x01"])
def test_a_damaged_configuration(llama: Path, text: str) -> None:
    (llama / "config.json").write_text(text)
    with pytest.raises(BadFile, match=r"config\.json"):
        read(llama)


@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "vocab_size", "rms_norm_eps"])
def test_a_configuration_that_lacks_an_entry(llama: Path, key: str) -> None:
    with pytest.raises(BadFile, match=f"lacks '{key}'"):
        read(configured(llama, **{key: None}))


@pytest.mark.parametrize("changes", [{"hidden_size": "48"}, {"num_hidden_layers": "three"},
                                     {"rope_parameters": 3}, {"num_hidden_layers": 2**40}])
def test_a_configuration_that_makes_no_sense(llama: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(BadFile):
        read(configured(llama, **changes))


def test_a_configuration_for_more_layers_than_there_are(llama: Path) -> None:
    with pytest.raises(BadFile, match=r"no tensor model\.layers\.3\."):
        read(configured(llama, num_hidden_layers=4))


def test_a_configuration_for_fewer_layers_opens_those(llama: Path) -> None:
    assert len(read(configured(llama, num_hidden_layers=2)).spec.rows) == 2


def test_a_layer_table_that_cannot_be_read(llama: Path) -> None:
    with pytest.raises(BadFile, match="missing keys"):
        read(configured(llama, model_type="layerwise", layer_table={"family": "llama"}))


def test_a_folder_without_configuration(tmp_path: Path) -> None:
    with pytest.raises(BadFile, match=r"no config\.json"):
        read(tmp_path)


@pytest.mark.parametrize("name", ["/nowhere/at/all", "some folder/model", "model.gguf"])
def test_a_path_that_is_not_there(name: str) -> None:
    with pytest.raises(BadFile, match=r"there is no file or folder|model hub"):
        read(name)


def test_a_single_file_of_a_folder(llama: Path) -> None:
    with pytest.raises(BadFile, match="is a single file") as error:
        read(llama / "model.safetensors")
    assert str(llama) in error.value.do


@pytest.mark.parametrize("name", ["nobody/nothing", "smolm2"])
def test_a_hub_id_that_cannot_be_reached(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def refuse(*_: Any, **__: Any) -> None:
        raise huggingface_hub.errors.LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(BadFile, match="the model hub gave none: offline") as error:
        read(name)
    assert "smollm2" in error.value.do


def test_a_hub_id_that_is_reached(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: str(llama))
    assert read("somebody/llama").name == "somebody/llama"


def test_an_unknown_dtype(llama: Path) -> None:
    with pytest.raises(BadOption, match="int8"):
        read(llama, dtype="int8")
