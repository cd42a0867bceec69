"""Saved folders: standard where the rows allow, with the table elsewhere; whole or not at all."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from layerwise.errors import BadFile, BadModel
from layerwise.io import manifest
from layerwise.io.save import save, standard_config
from layerwise.io.source import read
from layerwise.io.weights import build
from layerwise.nets.decoder import Decoder
from layerwise.nets.families import FAMILIES
from layerwise.nets.flow import Flow
from layerwise.spec import Attention, FeedForward, Format, LayerSpec, Norm, StackSpec

ROW = LayerSpec(Attention(4, 2, 8), FeedForward(48))
SPEC = StackSpec("llama", 32, 61, (ROW,) * 3, dtype="float32", extras={"eos_token_id": 2, "pretraining_tp": 1})
MIXED = SPEC.with_rows({0: replace(ROW, mixer=None), 2: replace(ROW, feed_forward=FeedForward(20), formats={
    "q": Format(4, 32), "down": Format(8, 0, True)})})


def random(spec: StackSpec) -> Decoder:
    torch.manual_seed(0)
    decoder = Decoder(spec).requires_grad_(False).eval()
    for name, tensor in decoder.state_dict().items():
        tensor.copy_(torch.randint(1, 50, tensor.shape) if "codes" in name else torch.rand(tensor.shape) - 0.5)
    return decoder


def logits(decoder: Decoder) -> Tensor:
    with torch.inference_mode():
        return decoder(torch.arange(9)[None], Flow(torch.arange(9)[None]))


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("spec", [SPEC, MIXED, replace(SPEC, tied=False),
                                  replace(MIXED, embedding_format=Format(8, 16), family="mistral"),
                                  replace(SPEC, embedding_scale=3.0, final_norm=Norm(eps=1e-3))])
def test_a_saved_model_opens_again_as_it_was(spec: StackSpec, tmp_path: Path) -> None:
    decoder = random(spec)
    assert save(tmp_path / "m", spec, decoder.state_dict().items()) == tmp_path / "m"
    source = read(tmp_path / "m")
    assert source.spec == spec
    again = build(source.weights)
    for name, tensor in decoder.state_dict().items():
        assert again.state_dict()[name].equal(tensor)
    assert logits(again).equal(logits(decoder))
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_equal_rows_make_the_familys_own_folder(tmp_path: Path) -> None:
    config = json.loads((save(tmp_path / "m", SPEC, random(SPEC).state_dict().items()) / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert (config["eos_token_id"], config["pretraining_tp"]) == (2, 1)


def test_unequal_rows_make_the_layer_table_format(tmp_path: Path) -> None:
    folder = save(tmp_path / "m", MIXED, random(MIXED).state_dict().items())
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "layerwise"
    assert (config["vocab_size"], config["num_hidden_layers"], config["eos_token_id"]) == (61, 3, 2)
    assert sum(tensor.nbytes for _, tensor in read(folder).weights.stream()) == MIXED.bytes()


@pytest.mark.parametrize("change", [
    {"embedding_scale": 2.0}, {"final_norm": Norm(eps=0.1)}, {"learned_positions": 4}, {"logit_softcap": 3.0},
    {"rows": (replace(ROW, post_norm=True),) * 3}, {"rows": (replace(ROW, norm=Norm(offset=1.0)),) * 3},
    {"rows": (ROW, replace(ROW, mixer=replace(ROW.mixer, window=4)), ROW)}, {"rows": ()},
    {"embedding_format": Format(8)}, {"family": "somebody's own"},
    {"rows": (replace(ROW, mixer=replace(ROW.mixer, qk_norm=True)),) * 3},
])
def test_a_standard_configuration_is_never_a_lie(change: dict[str, object]) -> None:
    spec = replace(SPEC, **change)  # type: ignore[arg-type]
    assert standard_config(spec) is None or FAMILIES["llama"]().spec(standard_config(spec)).diff(spec) == []


def test_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("layerwise.io.save.SHARD", 10_000)
    decoder = random(SPEC)
    folder = save(tmp_path / "m", SPEC, decoder.state_dict().items())
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    assert names[0] == f"model-00001-of-{len(names):05d}.safetensors"
    assert len(names) > 2
    assert logits(build(read(folder).weights)).equal(logits(decoder))


def test_bfloat16_tables_are_stored_so(tmp_path: Path) -> None:
    spec = replace(SPEC, dtype="bfloat16")
    save(tmp_path / "m", spec, random(SPEC).state_dict().items())
    assert {tensor.dtype for _, tensor in read(tmp_path / "m").weights.stream()} == {torch.bfloat16}


def test_tokenizer_files_travel_along(tmp_path: Path) -> None:
    assets = tmp_path / "assets"
    assets.mkdir()
    for name in ("tokenizer.json", "generation_config.json", "README.md"):
        (assets / name).write_text("{}")
    folder = save(tmp_path / "m", SPEC, random(SPEC).state_dict().items(), assets=assets)
    assert {path.name for path in folder.iterdir()} == {
        "config.json", "generation_config.json", "layerwise.json", "model.safetensors", "tokenizer.json"}


def test_notes_are_kept(tmp_path: Path) -> None:
    save(tmp_path / "m", SPEC, random(SPEC).state_dict().items(), notes={"from": "here"})
    assert json.loads((tmp_path / "m" / manifest.NAME).read_text())["notes"] == {"from": "here"}


# trust --------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save(tmp_path / "m", SPEC, random(SPEC).state_dict().items())


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_one_flipped_bit_is_noticed(saved: Path, name: str) -> None:
    data = bytearray((saved / name).read_bytes())
    data[-100] ^= 4
    (saved / name).write_bytes(data)
    with pytest.raises(BadFile, match=f"{name} is not what was saved"):
        read(saved)


def test_large_folders_are_compared_by_size_alone(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = bytearray((saved / "model.safetensors").read_bytes())
    data[-100] ^= 4
    (saved / "model.safetensors").write_bytes(data)
    manifest.verify(saved, largest=1000)
    (saved / "model.safetensors").write_bytes(data[:-1])
    with pytest.raises(BadFile, match=f"has {len(data) - 1:,} bytes"):
        manifest.verify(saved, largest=1000)


def test_an_absent_file_is_named(saved: Path) -> None:
    (saved / "model.safetensors").unlink()
    with pytest.raises(BadFile, match=r"lacks the file model\.safetensors"):
        read(saved)


@pytest.mark.parametrize("text", ["", "[]", '{"files": {"a": {}}}'])
def test_a_damaged_record(saved: Path, text: str) -> None:
    (saved / manifest.NAME).write_text(text)
    with pytest.raises(BadFile, match=r"layerwise\.json"):
        read(saved)


def test_a_check_that_fails_leaves_the_target_alone(saved: Path) -> None:
    before = files(saved)

    def check(beside: Path) -> None:
        assert read(beside).spec == MIXED  # what is checked is the new folder, beside the target
        raise BadModel("other logits", expected="the same", do="nothing")

    with pytest.raises(BadModel, match="other logits"):
        save(saved, MIXED, random(MIXED).state_dict().items(), check=check)
    assert files(saved) == before
    assert [path.name for path in saved.parent.iterdir()] == ["m"]


@pytest.mark.parametrize("broken", ["fewer", "misshapen", "unknown"])
def test_tensors_that_do_not_fit_the_table(saved: Path, broken: str) -> None:
    before = files(saved)
    tensors = dict(random(SPEC).state_dict())
    if broken == "fewer":
        del tensors["norm.weight"]
    else:
        tensors["norm.weight" if broken == "misshapen" else "norm.bias"] = torch.zeros(3)
    with pytest.raises(BadModel, match="norm"):
        save(saved, SPEC, tensors.items())
    assert files(saved) == before


def test_too_little_room_is_said_before_anything_is_written(
        saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = files(saved)
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1234})())
    with pytest.raises(BadFile, match="its disk has 1,234 free") as error:
        save(saved, SPEC, random(SPEC).state_dict().items())
    assert f"{SPEC.bytes():,} bytes" in error.value.given
    assert files(saved) == before


@pytest.mark.skipif(os.name == "nt", reason="needs a limit on the size of files")
def test_a_disk_that_fills_up_midway_leaves_the_target_alone(saved: Path) -> None:
    before = files(saved)
    code = f"""
import resource, signal
from tests.io.test_save import MIXED, random, save
from layerwise.errors import BadFile
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
decoder = random(MIXED)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    save({str(saved)!r}, MIXED, decoder.state_dict().items())
except BadFile as error:
    print(error)
"""
    assert resource.RLIMIT_FSIZE is not None
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert "cannot write" in done.stdout
    assert "what was there before is unchanged" in done.stdout
    assert files(saved) == before
    assert [path.name for path in saved.parent.iterdir()] == ["m"]
