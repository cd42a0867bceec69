"""Write a decoder as a folder: its family's standard one where the table allows, else one with the table."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from layerwise.errors import BadFile, BadModel
from layerwise.io import atomic, manifest
from layerwise.io.safetensors import write
from layerwise.io.tokenizer import FILES
from layerwise.io.weights import expected_tensors
from layerwise.nets.families import FAMILIES
from layerwise.nets.families.base import Link
from layerwise.spec import StackSpec

SHARD = 1 << 30
Named = tuple[str, Tensor]


def save(target: str | Path, spec: StackSpec, tensors: Iterable[Named], *, assets: Path | None = None,
         check: Callable[[Path], None] | None = None, notes: Mapping[str, Any] | None = None) -> Path:
    """Write `tensors`, named as in `Decoder(spec)`, to the folder `target`, and return it.

    An equal-row dense table becomes the standard folder of its family, which transformers opens; any other
    the layer-table format. Tokenizer files are copied from `assets`. The folder is written beside the target,
    `check` is called with it, and only then it takes the target's place. Raises BadFile where it cannot be
    written, with the target as it was.
    """
    target = Path(target)
    _room(target, spec.bytes())
    config = standard_config(spec)
    named = in_table_dtype(tensors, spec)
    if config is not None:
        named = to_family(named, FAMILIES[spec.family]().links(spec))
    with atomic.folder(target) as beside:
        text = json.dumps(config or table_config(spec), indent=2)
        (beside / "config.json").write_text(text + "\n", encoding="utf-8")
        write_tensors(beside, named)
        for name in FILES if assets else ():
            if (assets / name).exists():  # type: ignore[operator]
                shutil.copyfile(assets / name, beside / name)  # type: ignore[operator]
        manifest.write(beside, notes)
        if check is not None:
            check(beside)
    return target


def standard_config(spec: StackSpec) -> dict[str, Any] | None:
    """The family's own configuration, or None where it cannot say everything that is in the table."""
    if spec.family not in FAMILIES:
        return None
    family = FAMILIES[spec.family]()
    try:
        config: dict[str, Any] = family.config(spec)
        return config if not family.spec(config).diff(spec) else None
    except BadModel:
        return None


def table_config(spec: StackSpec) -> dict[str, Any]:
    """`config.json` of the layer-table format, with the entries that other tools look for."""
    ids = {key: value for key, value in spec.extras.items() if key.endswith("_token_id")}
    return {"architectures": ["LayerwiseForCausalLM"], "model_type": "layerwise", "dtype": spec.dtype,
            "vocab_size": spec.vocabulary, "hidden_size": spec.hidden, "num_hidden_layers": len(spec.rows),
            "max_position_embeddings": spec.context, "tie_word_embeddings": spec.tied, **ids,
            "layer_table": spec.to_json()}


def in_table_dtype(tensors: Iterable[Named], spec: StackSpec) -> Iterator[Named]:
    """The tensors on the CPU, dense ones in the table's dtype.

    Raises BadModel where one is absent or misshapen.
    """
    expected = expected_tensors(spec)
    for name, tensor in tensors:
        shape, dtype = expected.pop(name, (None, tensor.dtype))
        if shape != tuple(tensor.shape):
            raise BadModel(f"a tensor {name} of shape {tuple(tensor.shape)}",
                           expected=f"{shape}, as the table says",
                           do="save the table that belongs to these weights")
        yield name, tensor.detach().to("cpu", dtype)
    if expected:
        raise BadModel(f"{len(expected)} tensors fewer than the table, such as {next(iter(expected))}",
                       expected="every tensor of the table",
                       do="save the table that belongs to these weights")


def to_family(tensors: Iterable[Named], links: Iterable[Link]) -> Iterator[Named]:
    """Tensors by our names as tensors of the family: fused, transposed, and split into experts."""
    by_ours: dict[str, list[Link]] = {}
    waiting: dict[str, int] = {}
    for link in links:
        by_ours.setdefault(link.ours, []).append(link)
        waiting[link.theirs] = waiting.get(link.theirs, 0) + 1
    pieces: dict[str, list[tuple[int, Tensor]]] = {}
    for name, tensor in tensors:
        for link in by_ours[name]:
            start = link.theirs_rows[0] if link.theirs_rows else 0
            piece = tensor if link.ours_rows is None else tensor[slice(*link.ours_rows)]
            found = pieces.setdefault(link.theirs, [])
            found.append((start, piece))
            if len(found) == waiting[link.theirs]:
                rows = [part for _, part in sorted(pieces.pop(link.theirs), key=lambda item: item[0])]
                whole = rows[0] if len(rows) == 1 else torch.cat(rows)
                yield link.theirs, whole.T if link.transpose else whole


def write_tensors(folder: Path, tensors: Iterable[Named]) -> None:
    """`model.safetensors`, or shards of about 1 GB with an index, holding one shard in memory at most."""
    shards: list[list[str]] = []
    size = 0
    for number, shard in enumerate(_shards(tensors)):
        write(folder / f"shard-{number}.safetensors", shard)
        shards.append(list(shard))
        size += sum(tensor.nbytes for tensor in shard.values())
    if len(shards) == 1:
        (folder / "shard-0.safetensors").rename(folder / "model.safetensors")
        return
    places: dict[str, str] = {}
    for number, names in enumerate(shards):
        final = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"shard-{number}.safetensors").rename(folder / final)
        places |= dict.fromkeys(names, final)
    index = {"metadata": {"total_size": size}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def _shards(tensors: Iterable[Named]) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > SHARD:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    yield shard


def _room(target: Path, needed: int) -> None:
    place = next(parent for parent in target.absolute().parents if parent.exists())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise BadFile(f"cannot write {needed:,} bytes to {target}: its disk has {free:,} free",
                      expected="room for the whole model beside what is there now",
                      do="free some room or choose another place; what was there before is unchanged")
