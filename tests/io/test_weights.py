"""The tensors of a decoder by our names: complete, in shape, finite, in the right dtype."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from layerwise.errors import BadFile, BadModel
from layerwise.io.safetensors import ALIGNMENT
from layerwise.io.save import save
from layerwise.io.source import Source, read
from layerwise.io.weights import build, expected_tensors
from layerwise.nets.decoder import Decoder
from layerwise.spec import Attention, FeedForward, Format, LayerSpec, StackSpec
from tests.nets.tiny import tiny, write

KEY = "model.layers.1.self_attn.k_proj.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tiny("llama"), tmp_path / "llama")


def edited(folder: Path, **changes: Tensor | None) -> Path:
    """The folder with tensors replaced, added, or (None) taken away; names with _ for the dots of layer 1."""
    file = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    for name, value in changes.items():
        full = {"key": KEY}.get(name, name)
        if value is None:
            del tensors[full]
        else:
            tensors[full] = value
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def test_layers_and_outside_are_all_there_is(folder: Path) -> None:
    weights = read(folder).weights
    names = {f"layers.{i}.{name}" for i in range(3) for name in weights.layer(i)} | set(weights.outside())
    assert names == set(weights.expected) == {name for name, _ in weights.stream()}


def test_dense_tensors_are_views_of_the_file(folder: Path) -> None:
    weights = read(folder).weights
    layer = weights.layer(1)
    assert layer["attention.body.k.weight"].equal(load_file(folder / "model.safetensors")[KEY])
    storages = {tensor.untyped_storage().data_ptr() for tensor in layer.values()}
    assert len(storages) == 1  # one mapping for the whole layer


def test_a_missing_tensor_is_named(folder: Path) -> None:
    with pytest.raises(BadFile, match=f"no tensor {KEY}"):
        read(edited(folder, key=None))


def test_a_misshapen_tensor_is_named_with_both_shapes(folder: Path) -> None:
    with pytest.raises(BadFile, match=KEY) as error:
        read(edited(folder, key=torch.zeros(24, 40)))
    assert "(24, 40)" in error.value.given
    assert "(24, 48)" in error.value.expected


def test_a_tensor_that_the_configuration_has_no_use_for(folder: Path) -> None:
    extra = {"model.layers.1.self_attn.q_proj.bias": torch.zeros(48)}
    with pytest.raises(BadFile, match=r"q_proj\.bias"):
        read(edited(folder, **extra))


def test_constants_that_older_writers_kept_are_no_harm(folder: Path) -> None:
    extra = {"model.layers.1.self_attn.rotary_emb.inv_freq": torch.zeros(6), "lm_head.weight": torch.zeros(131, 48)}
    read(edited(folder, **extra))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_is_named(folder: Path, bad: float) -> None:
    value = torch.zeros(24, 48)
    value[7, 3] = bad
    source = read(edited(folder, key=value))
    with pytest.raises(BadModel, match=r"layers\.1\.attention\.body\.k\.weight"):
        source.weights.finite()


def test_finite_weights_pass(folder: Path) -> None:
    read(folder).weights.finite()


def test_gpt2_shapes_are_compared_as_they_are_stored(tmp_path: Path) -> None:
    folder = write(tiny("gpt2"), tmp_path / "gpt2")
    name = "transformer.h.0.attn.c_attn.weight"
    with pytest.raises(BadFile, match=name):
        read(edited(folder, **{name: torch.zeros(144, 48)}))


def test_a_dtype_can_be_asked_for(folder: Path) -> None:
    source = read(folder, dtype="bfloat16")
    assert source.spec.dtype == "bfloat16"
    assert {tensor.dtype for _, tensor in source.weights.stream()} == {torch.bfloat16}


def packed_source(tmp_path: Path, dtype: str | None = None) -> Source:
    formats = {"q": Format(8, 0, True), "up": Format(4, 32), "down": Format(3, 16, True)}
    row = LayerSpec(Attention(2, 1, 8), FeedForward(48), formats=formats)
    spec = StackSpec("llama", 16, 40, (row, row), dtype="float32", embedding_format=Format(8, 16))
    decoder = Decoder(spec)
    with torch.no_grad():
        for name, tensor in decoder.state_dict().items():
            tensor.copy_(torch.randint(1, 50, tensor.shape) if "codes" in name else torch.rand(tensor.shape))
    save(tmp_path / "packed", spec, decoder.state_dict().items())
    return read(tmp_path / "packed", dtype=dtype)


def test_packed_buffers_keep_their_dtype_and_are_aligned(tmp_path: Path) -> None:
    source = packed_source(tmp_path, "bfloat16")
    for name, tensor in source.weights.stream():
        kind = name.rpartition(".")[2]
        assert tensor.dtype == ({torch.int8, torch.uint8} & {tensor.dtype} or {torch.bfloat16}).pop()
        if kind == "codes":
            assert tensor.data_ptr() % ALIGNMENT == 0


def test_a_packed_decoder_is_built_and_agrees(tmp_path: Path) -> None:
    source = packed_source(tmp_path)
    decoder = build(source.weights)
    assert {name: (tuple(t.shape), t.dtype) for name, t in decoder.state_dict().items()} == \
        expected_tensors(source.spec)
    assert sum(tensor.nbytes for tensor in decoder.state_dict().values()) == source.spec.bytes()
