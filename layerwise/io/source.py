"""What a model can be opened from: a folder, a GGUF file, a demo model's name, a hub id."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from layerwise.errors import BadFile, BadModel, BadOption
from layerwise.io import manifest
from layerwise.io.checkpoint import Checkpoint, Renamed
from layerwise.io.gguf_model import GGUFCheckpoint
from layerwise.io.gguf_tokenizer import GGUFTokenizer
from layerwise.io.safetensors import SafetensorsCheckpoint
from layerwise.io.tokenizer import FILES, Tokenizer, read_json
from layerwise.io.weights import DTYPES, Weights
from layerwise.nets.families import FAMILIES
from layerwise.nets.families.base import Family, Link
from layerwise.spec import StackSpec

AS_MODULE = "open it as a module: layerwise.open(transformers.AutoModel.from_pretrained(...))"
WRAPPED = {"gemma3": "gemma3_text"}
"""Multimodal model types whose `text_config` is one of our families."""

RENAMES: tuple[Callable[[str], str], ...] = (
    lambda name: name,
    lambda name: name.removeprefix("transformer."),
    lambda name: name.removeprefix("model."),
    lambda name: f"language_model.{name}",
    lambda name: f"model.language_model.{name.removeprefix('model.')}",
)
"""How writers of one family spell the same names: usual, bare, or inside a multimodal model."""


@dataclass(frozen=True)
class Source:
    """A model found: its table, where its tensors are, its tokenizer and its folder if it has them."""

    spec: StackSpec
    weights: Weights
    tokenizer: Tokenizer | None
    folder: Path | None
    name: str


def read(source: str | Path, *, dtype: str | None = None) -> Source:
    """Find a model and check its configuration, tensor names and shapes; no weight is read.

    `source` is a Hugging Face folder or one in the layer-table format, a `.gguf` file, the name of a demo
    model, or a hub id. `dtype` replaces the stored one (`float32`, `bfloat16`, `float16`).
    Raises BadFile where files are absent or damaged, BadModel where the model is not one of our families.
    """
    if dtype is not None and dtype not in DTYPES:
        raise BadOption(f"dtype={dtype!r}", expected=f"one of {sorted(DTYPES)}",
                        do="leave it out to keep the stored one")
    path = Path(source).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        found = read_gguf(path, dtype)
    elif path.is_file():
        raise BadFile(f"{path} is a single file", expected="a model folder or a .gguf file",
                      do=f"give the folder it lies in: {path.parent}")
    elif path.is_dir():
        found = _read_folder(path, dtype)
    else:
        found = replace(_read_folder(_fetch(str(source)), dtype), name=str(source))
    found.weights.check()
    return found


def _fetch(name: str) -> Path:
    from layerwise.io.demos import DEMOS, demo
    from layerwise.io.hub import looks_like_id, snapshot

    if name in DEMOS:
        return demo(name)
    if looks_like_id(name):
        return snapshot(name)
    raise BadFile(f"there is no file or folder {name}", expected="a model folder, a .gguf file, a hub id "
                  f"(owner/name), or one of the demo models {', '.join(DEMOS)}",
                  do="check the path, or try smollm2")


def _read_folder(folder: Path, dtype: str | None) -> Source:
    if not (folder / "config.json").exists():
        raise BadFile(f"{folder} has no config.json",
                      expected="a Hugging Face folder or one that layerwise saved",
                      do="give the folder that holds config.json and the .safetensors files")
    manifest.verify(folder)
    config = read_json(folder / "config.json")
    checkpoint: Checkpoint = SafetensorsCheckpoint(folder)
    links: list[Link] | None = None
    with _sensible(folder / "config.json"):
        if config.get("model_type") == "layerwise":
            spec = StackSpec.from_json(config["layer_table"])
        else:
            family, config = _family(folder, config)
            _countable(config, checkpoint)
            spec = family.spec(config | _stored_dtype(config, checkpoint))
            links = list(family.links(spec))
            checkpoint = _spelled(checkpoint, links)
        spec = _in_dtype(spec, dtype)
        weights = Weights(checkpoint, spec, links)
    known = any((folder / name).exists() for name in FILES if name != "generation_config.json")
    tokenizer = Tokenizer(folder, spec.vocabulary) if known else None
    return Source(spec, weights, tokenizer, folder, folder.name)


def read_gguf(path: Path, dtype: str | None = None) -> Source:
    """A GGUF file whatever its name; see `read`."""
    checkpoint = GGUFCheckpoint(path, DTYPES[dtype] if dtype else None)
    with _sensible(path):
        _countable(checkpoint.config, checkpoint)
        family: Family = FAMILIES[checkpoint.config["model_type"]]()
        spec = _in_dtype(checkpoint.uneven(family.spec(checkpoint.config)), dtype)
        weights = Weights(checkpoint, spec, family.links(spec))
    known = "tokenizer.ggml.tokens" in checkpoint.file.metadata
    tokenizer = GGUFTokenizer(checkpoint.file, spec.vocabulary) if known else None
    return Source(spec, weights, tokenizer, None, path.stem)


@contextmanager
def _sensible(place: Path) -> Iterator[None]:
    """Turns what a senseless configuration runs into, on the way to a table, into one error."""
    try:
        yield
    except KeyError as error:
        raise BadFile(f"the configuration in {place} lacks {error}", expected="what its model type needs",
                      do="fetch or save the model again") from error
    except (TypeError, ValueError, AttributeError, IndexError, ArithmeticError, RuntimeError, BadOption) as error:
        raise BadFile(f"the configuration in {place} makes no sense: {error}",
                      expected="sizes and choices of its model type", do="fetch or save the model again") from error


def _family(folder: Path, config: dict[str, Any]) -> tuple[Family, dict[str, Any]]:
    kind = str(config.get("model_type"))
    if kind in WRAPPED and isinstance(config.get("text_config"), dict):
        outer = {key: config[key] for key in ("dtype", "torch_dtype") if key in config}
        config = outer | config["text_config"]
        kind = WRAPPED[kind]
    if kind not in FAMILIES:
        raise BadModel(f"{folder} holds a model of type {kind!r}",
                       expected=f"one of {', '.join(sorted(FAMILIES))}", do=AS_MODULE)
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "unknown")
        raise BadModel(f"{folder} holds weights packed by {method}",
                       expected="dense weights, or a folder that layerwise packed",
                       do=f"fetch the dense original, or {AS_MODULE}")
    return FAMILIES[kind](), config


def _countable(config: Mapping[str, Any], checkpoint: Checkpoint) -> None:
    """Raises ValueError for more layers or experts than there are tensors, before a table is made of them."""
    for key in ("num_hidden_layers", "n_layer", "num_experts", "num_local_experts"):
        if config.get(key) is not None and int(config[key]) > len(checkpoint.names()):
            raise ValueError(f"{key} is {config[key]} and there are {len(checkpoint.names())} tensors")


def _stored_dtype(config: Mapping[str, Any], checkpoint: Checkpoint) -> dict[str, str]:
    """The dtype most tensors have, for configurations that name none."""
    if config.get("dtype") or config.get("torch_dtype"):
        return {}
    found = [checkpoint.dtype(name) for name in sorted(checkpoint.names())]
    known = [name for name, dtype in DTYPES.items() if dtype in found]
    return {"dtype": max(known, key=lambda name: found.count(DTYPES[name]))} if known else {}


def _spelled(checkpoint: Checkpoint, links: Iterable[Link]) -> Checkpoint:
    """The checkpoint under its family's usual names, whichever spelling it was written in."""
    names = {link.theirs for link in links}
    stored = checkpoint.names()
    best = max(RENAMES, key=lambda rename: sum(rename(name) in stored for name in names))
    return checkpoint if best is RENAMES[0] else Renamed(checkpoint, best, names)


def _in_dtype(spec: StackSpec, dtype: str | None) -> StackSpec:
    return spec if dtype is None else replace(spec, dtype=dtype)  # type: ignore[arg-type]
