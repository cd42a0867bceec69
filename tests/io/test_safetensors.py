"""Mapped safetensors: what the library writes is read, lazily, and damage is named."""

from __future__ import annotations

import contextlib
import gc
import json
from pathlib import Path

import psutil
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from layerwise.errors import BadFile
from layerwise.io.safetensors import ALIGNMENT, NAMES, SafetensorsCheckpoint, write

MIB = 1 << 20


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    found = {str(dtype): torch.randint(0, 2, (3, 5), generator=generator).to(dtype) for dtype in NAMES.values()}
    wide = torch.randn(2, 3, 7, generator=generator)
    return found | {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 4), "wide": wide}


def written(folder: Path, values: dict[str, Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(values, folder / "model.safetensors")
    return folder


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert found[name].flatten().view(torch.uint8).equal(tensor.flatten().view(torch.uint8))


def test_every_dtype_is_read_as_it_was_written(tmp_path: Path) -> None:
    checkpoint = SafetensorsCheckpoint(written(tmp_path, tensors()))
    assert checkpoint.names() == frozenset(tensors())
    assert_equal(checkpoint.tensors(sorted(checkpoint.names())), tensors())
    for name, tensor in tensors().items():
        assert (checkpoint.shape(name), checkpoint.dtype(name)) == (tuple(tensor.shape), tensor.dtype)
        assert_equal({name: checkpoint.tensor(name)}, {name: tensor})


def test_what_is_written_here_the_library_reads(tmp_path: Path) -> None:
    write(tmp_path / "model.safetensors", tensors())
    assert_equal(load_file(tmp_path / "model.safetensors"), tensors())
    assert_equal(SafetensorsCheckpoint(tmp_path).tensors(tensors()), tensors())


def test_the_first_tensor_written_is_aligned(tmp_path: Path) -> None:
    write(tmp_path / "model.safetensors", {"a": torch.ones(64), "b": torch.ones(3)})
    checkpoint = SafetensorsCheckpoint(tmp_path)
    assert checkpoint.tensor("a").data_ptr() % ALIGNMENT == 0
    assert checkpoint.tensor("b").data_ptr() % ALIGNMENT == 0


def test_tensors_at_odd_places_are_read(tmp_path: Path) -> None:
    values = {"bytes": torch.arange(3, dtype=torch.uint8), "numbers": torch.randn(4), "half": torch.ones(2).half()}
    header = {"bytes": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
              "numbers": {"dtype": "F32", "shape": [4], "data_offsets": [3, 19]},
              "half": {"dtype": "F16", "shape": [2], "data_offsets": [19, 23]}}
    text = json.dumps(header).encode()
    data = b"".join(bytes(tensor.view(torch.uint8).tolist()) for tensor in values.values())
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    assert_equal(SafetensorsCheckpoint(tmp_path).tensors(values), values)


def test_neighbours_share_a_mapping_and_writing_leaves_the_file_alone(tmp_path: Path) -> None:
    values = {name: torch.randn(100) for name in "abc"}
    checkpoint = SafetensorsCheckpoint(written(tmp_path, values))
    found = checkpoint.tensors("abc")
    assert found["b"].data_ptr() - found["a"].data_ptr() == found["a"].nbytes
    found["b"].zero_()
    assert_equal(checkpoint.tensors("abc"), values)


def test_nothing_is_read_before_it_is_touched_and_nothing_kept_after(tmp_path: Path) -> None:
    resident = psutil.Process().memory_info
    checkpoint = SafetensorsCheckpoint(written(tmp_path, {"big": torch.ones(32 * MIB)}))
    gc.collect()
    start = resident().rss
    tensor = checkpoint.tensor("big")
    assert resident().rss - start < 16 * MIB
    assert tensor.sum() == 32 * MIB
    assert resident().rss - start > 100 * MIB
    del tensor
    assert resident().rss - start < 16 * MIB


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    places = {}
    for number, name in enumerate("abc"):
        save_file({name: torch.full((4,), number)}, tmp_path / f"model-{number}.safetensors")
        places[name] = f"model-{number}.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return tmp_path


def test_shards_are_one_checkpoint(sharded: Path) -> None:
    found = SafetensorsCheckpoint(sharded).tensors("cab")
    assert {name: int(tensor[0]) for name, tensor in found.items()} == {"a": 0, "b": 1, "c": 2}


def test_an_absent_shard_is_named(sharded: Path) -> None:
    (sharded / "model-1.safetensors").unlink()
    with pytest.raises(BadFile, match=r"lacks the shard model-1\.safetensors"):
        SafetensorsCheckpoint(sharded)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"weight_map": 3}', '{"other": {}}'])
def test_a_damaged_index_is_refused(sharded: Path, text: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(text)
    with pytest.raises(BadFile, match=r"index\.json cannot be read"):
        SafetensorsCheckpoint(sharded)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(BadFile, match=r"no \.safetensors file"):
        SafetensorsCheckpoint(tmp_path)


def test_an_absent_tensor_is_named(tmp_path: Path) -> None:
    checkpoint = SafetensorsCheckpoint(written(tmp_path, {"a": torch.ones(1)}))
    with pytest.raises(BadFile, match=r"no tensor layers\.3\.q"):
        checkpoint.tensor("layers.3.q")


@pytest.mark.parametrize("lost", [1, 37, 400])
def test_a_truncated_file_says_both_sizes(tmp_path: Path, lost: int) -> None:
    file = written(tmp_path, {"a": torch.ones(100)}) / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-lost])
    with pytest.raises(BadFile, match=f"{len(whole) - lost:,} bytes") as error:
        SafetensorsCheckpoint(tmp_path)
    assert f"{len(whole):,} bytes" in error.value.expected
    assert "truncated" in error.value.do


@pytest.mark.parametrize("kept", [0, 5, 8, 20])
def test_a_file_cut_inside_its_header_is_refused(tmp_path: Path, kept: int) -> None:
    file = written(tmp_path, {"a": torch.ones(100)}) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(BadFile, match="announces a header"):
        SafetensorsCheckpoint(tmp_path)


@pytest.mark.parametrize("header", [
    b"not json", b"[1]", b'{"a": 3}', b'{"a": {"dtype": "Q9", "shape": [1], "data_offsets": [0, 4]}}',
    b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
    b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]}}',
    b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}',
])
def test_a_damaged_header_is_refused(tmp_path: Path, header: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(BadFile):
        SafetensorsCheckpoint(tmp_path)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 200), bit=st.integers(0, 7))
def test_a_flipped_bit_in_the_header_gives_tensors_or_one_clear_error(
        tmp_path: Path, place: int, bit: int) -> None:
    file = written(tmp_path, {"a": torch.ones(10), "b": torch.ones(3, 3).half()}) / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[min(place, len(data) - 70)] ^= 1 << bit
    file.write_bytes(data)
    with contextlib.suppress(BadFile):  # nothing else may come out
        checkpoint = SafetensorsCheckpoint(tmp_path)
        checkpoint.tensors(checkpoint.names())
