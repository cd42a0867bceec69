"""GGUF files give the model they were written from, and damaged ones one clear error."""

from __future__ import annotations

import contextlib
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from layerwise.errors import BadFile, BadModel
from layerwise.io.gguf import CHUNK, GGUFFile
from layerwise.io.gguf_model import read_config
from layerwise.io.source import read
from layerwise.io.weights import build
from layerwise.nets.flow import Flow
from tests.io.gguf_writer import write_gguf
from tests.nets.tiny import tiny, write

CASES = ["llama", "llama-untied", "llama-biases", "llama-rope-linear", "qwen2", "qwen3", "gemma3", "gpt2",
         "mixtral", "qwen3-moe"]
OWN = {"gemma3": {"layer_types": ["sliding_attention"] * 3, "query_pre_attn_scalar": 256, "head_dim": 256},
       "qwen3": {"head_dim": 128}, "gpt2": {"n_positions": 1024}}
"""Values that transformers takes for granted where it reads GGUF."""

TRANSFORMERS_READS = {"llama", "llama-untied", "qwen2", "qwen3", "gemma3", "gpt2"}


def model_and_file(case: str, folder: Path, kind: Kind | None = None) -> tuple[Any, Path]:
    model = tiny(case, **OWN.get(case, {}))
    tensors = load_file(write(model, folder / "hf") / "model.safetensors")
    return model, write_gguf(model, tensors, folder / "model.gguf", kind)


def tokens() -> Tensor:
    return torch.randint(131, (2, 17), generator=torch.Generator().manual_seed(1))


def logits(path: Path) -> Tensor:
    with torch.inference_mode():
        return build(read(path).weights)(tokens(), Flow(torch.arange(17).expand(2, -1)))


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_the_model_written(case: str, tmp_path: Path) -> None:
    model, path = model_and_file(case, tmp_path)
    with torch.inference_mode():
        torch.testing.assert_close(logits(path), model(tokens()).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("case", sorted(TRANSFORMERS_READS))
def test_logits_are_those_that_transformers_reads(case: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    _, path = model_and_file(case, tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32)
    with torch.inference_mode():
        torch.testing.assert_close(logits(path), theirs(tokens()).logits, rtol=0, atol=1e-4)


def test_llama3_scaling_is_found_in_its_table_of_divisors(tmp_path: Path) -> None:
    rope = {"rope_type": "llama3", "rope_theta": 500_000.0, "factor": 32.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    model = tiny("llama", rope_parameters=rope, hidden_size=256)
    tensors = load_file(write(model, tmp_path / "hf") / "model.safetensors")
    source = read(write_gguf(model, tensors, tmp_path / "model.gguf"))
    assert source.spec.rows[0].mixer == read(tmp_path / "hf").spec.rows[0].mixer


def test_an_unknown_table_of_divisors_is_refused(tmp_path: Path) -> None:
    _, path = model_and_file("llama", tmp_path)
    file = GGUFFile(path)
    file.tensors = dict(file.tensors) | {"rope_freqs.weight": file.tensors["blk.0.attn_norm.weight"]}
    with pytest.raises(BadModel, match="its own table"):
        read_config(file)


def test_a_full_precision_file_stays_so_unless_told(tmp_path: Path) -> None:
    _, path = model_and_file("llama", tmp_path)
    assert read(path).spec.dtype == "float32"
    assert read(path, dtype="bfloat16").weights.layer(0)["attention.body.q.weight"].dtype == torch.bfloat16


BLOCKS = [kind for kind, (block, _) in gguf.GGML_QUANT_SIZES.items()
          if kind in gguf.quants._type_traits and block > 1]


@pytest.mark.parametrize("kind", BLOCKS, ids=lambda kind: kind.name)
def test_every_quantised_type_is_read_as_the_gguf_package_reads_it(kind: Kind, tmp_path: Path) -> None:
    block, size = gguf.GGML_QUANT_SIZES[kind]
    rows = CHUNK // (2 * block) + 3 if block >= 256 else 5  # more than one chunk for the large blocks
    random = np.random.default_rng(0).integers(0, 100, (rows, 2 * size), dtype=np.uint8)
    writer = gguf.GGUFWriter(str(tmp_path / "m.gguf"), "llama")
    writer.add_tensor("x", random, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GGUFFile(tmp_path / "m.gguf")
    expected = torch.from_numpy(gguf.dequantize(random, kind))
    assert file.type_name("x") == kind.name
    torch.testing.assert_close(file.read("x", torch.float32), expected, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(file.read("x", torch.bfloat16), expected.bfloat16(), rtol=0, atol=0,
                               equal_nan=True)


@pytest.mark.parametrize("kind", [Kind.Q8_0, Kind.Q5_1, Kind.Q4_0, Kind.BF16, Kind.F16])
def test_quantised_models_open(kind: Kind, tmp_path: Path) -> None:
    model = tiny("qwen3-moe", hidden_size=64, moe_intermediate_size=32, head_dim=16)
    tensors = load_file(write(model, tmp_path / "hf") / "model.safetensors")
    path = write_gguf(model, tensors, tmp_path / "model.gguf", kind)
    source = read(path)
    assert source.spec.dtype == ("float16" if kind == Kind.F16 else "bfloat16")
    name = "model.layers.1.mlp.experts.2.down_proj.weight"
    expected = gguf.dequantize(gguf.quantize(tensors[name].numpy(), kind), kind)
    found = source.weights.tensor("layers.1.feed_forward.body.down.weight").chunk(4)[2]
    torch.testing.assert_close(found, torch.from_numpy(expected).to(found.dtype))


def test_a_truncated_file_says_both_sizes(tmp_path: Path) -> None:
    _, path = model_and_file("llama", tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1000])
    with pytest.raises(BadFile, match=f"{len(whole) - 1000:,} bytes") as error:
        read(path)
    assert f"{len(whole):,} bytes" in error.value.expected


@pytest.mark.parametrize("damage", [b"", b"GGUF", b"GGUX" + bytes(40), b"GGUF" + struct.pack("<IQQ", 9, 0, 0),
                                    b"GGUF" + struct.pack("<IQQ", 3, 2**60, 2**60),
                                    b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**63)])
def test_what_is_no_gguf_is_refused(damage: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(damage)
    with pytest.raises(BadFile):
        read(path)


@pytest.fixture(scope="module")
def whole_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A file that is right, and where its header ends. No bytes: hypothesis refuses to print arguments that long."""
    folder = tmp_path_factory.mktemp("gguf")
    _, path = model_and_file("llama", folder)
    start = min(tensor.start for tensor in GGUFFile(path).tensors.values())
    return path, start


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_in_the_header_gives_a_model_or_one_clear_error(
        whole_file: tuple[Path, int], place: float, bit: int) -> None:
    path, start = whole_file
    flipped = bytearray(path.read_bytes())
    flipped[int(place * start)] ^= 1 << bit
    beside = path.with_name("flipped.gguf")
    beside.write_bytes(flipped)
    with contextlib.suppress(BadFile, BadModel):  # nothing else may come out
        read(beside)


def test_a_size_of_zero_is_named(whole_file: tuple[Path, int], tmp_path: Path) -> None:
    data = whole_file[0].read_bytes()
    for key in ("llama.attention.head_count", "llama.feed_forward_length"):
        name = struct.pack("<Q", len(key)) + key.encode()
        place = data.index(name) + len(name) + 4  # behind the type
        broken = data[:place] + struct.pack("<I", 0) + data[place + 4 :]
        (tmp_path / "model.gguf").write_bytes(broken)
        with pytest.raises(BadFile, match="is 0"):
            read(tmp_path / "model.gguf")


def test_an_unknown_architecture_says_what_to_do(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(str(tmp_path / "m.gguf"), "mamba")
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(BadModel, match="'mamba'"):
        read(tmp_path / "m.gguf")
