"""compressed-tensors: a Hugging Face folder whose packed matrices transformers, vLLM and SGLang read.

The stream of bits is the one layerwise stores, so codes and scales go over as they are. A zero point there is
an integer code while here it is a number, and transformers cannot load packed zero points; so formats with zero
points are rounded again without them, where that is allowed.

Shapes: O rows, S bytes in a row.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from layerwise.export.base import NOTHING, Allowed, Export, Written, check_rows, names, refuse
from layerwise.export.dense import dense_tensors
from layerwise.export.source import Source
from layerwise.io import atomic, manifest
from layerwise.io.save import in_table_dtype, standard_config, to_family, write_tensors
from layerwise.io.tokenizer import FILES
from layerwise.nets.decoder import MATRICES, Block
from layerwise.nets.families import FAMILIES
from layerwise.nets.packed import PackedLinear
from layerwise.spec import Format, StackSpec
from layerwise.stack.decoder import DecoderStack
from layerwise.transform.quantize import rounded_by

Named = tuple[str, Tensor]
WORD = 4


class CompressedTensors(Export):
    """The model as a folder in the `pack-quantized` format."""

    summary: ClassVar[str] = "a Hugging Face folder with packed weights"
    suffix: ClassVar[str] = ""

    def write(self, source: Source, output: Path, allowed: Allowed = NOTHING) -> Written:
        """Write `source` to the folder `output`.

        Raises BadOption naming the first matrix or layer that the format cannot hold and what to allow.
        """
        spec = source.spec
        check_rows(spec.rows, "compressed-tensors")
        plain = _plain(spec)
        config = standard_config(plain)
        if config is None:
            raise refuse(f"a {spec.family} whose layers differ in shape", "compressed-tensors", "equal layers",
                         "export to gguf, or keep the model in layerwise's own format")
        again = _packed(spec, allowed)
        stack = source.stack
        if again:
            config["quantization_config"] = quantization_config(spec, set(again))
        with atomic.folder(output) as beside:
            (beside / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            write_tensors(beside, _tensors(stack, plain, again))
            _assets(stack, beside)
            manifest.write(beside)
        rounded = [place for place, anew in again.items() if anew]
        notes = [f"{len(again)} matrices packed"]
        if rounded:
            notes.append(f"{len(rounded)} rounded again without zero points, such as {rounded[0][1]!r} of layer "
                         f"{rounded[0][0]}")
        return Written(output, sum(path.stat().st_size for path in output.iterdir()), tuple(notes))


Place = tuple[int, str]
"""A layer and the name of a matrix."""


def _plain(spec: StackSpec) -> StackSpec:
    """The table without formats and factors."""
    rows = tuple(replace(row, formats={}, ranks={}) for row in spec.rows)
    return replace(spec, rows=rows, embedding_format=None, head_format=None)


def _packed(spec: StackSpec, allowed: Allowed) -> dict[Place, bool]:
    """Which matrices are stored packed, and whether they are rounded again."""
    for name, format in (("embedding", spec.embedding_format), ("head", spec.head_format)):
        if format is not None and not allowed.dense:
            raise refuse(f"the {name} in {format.words}", "compressed-tensors",
                         "packed matrices in layers", "allow --allow-dense (the table takes more bytes)")
    found: dict[Place, bool] = {}
    for layer, name, row in names(spec.rows, spec.hidden):
        what = f"the matrix {name!r} of layer {layer}"
        if name in row.ranks:
            if not allowed.dense:
                raise refuse(f"{what} as two factors of rank {row.ranks[name]}", "compressed-tensors",
                             "whole matrices", "allow --allow-dense (their product, which takes more bytes)")
        elif name in row.formats:
            verdict = _verdict(spec, layer, name, what, allowed)
            if verdict is not None:
                found[layer, name] = verdict
    return found


def _verdict(spec: StackSpec, layer: int, name: str, what: str, allowed: Allowed) -> bool | None:
    """Whether to round again; None for dense."""
    row, format = spec.rows[layer], spec.rows[layer].formats[name]
    columns = row.matrices(spec.hidden)[name][1]
    experts = row.feed_forward is not None and row.feed_forward.experts and MATRICES[name] == "feed_forward"
    if spec.family == "gpt2" or experts or (format.group and columns % format.group):
        if allowed.dense:
            return None
        why = "in stacked experts" if experts else "in a GPT-2" if spec.family == "gpt2" else \
            f"in groups of {format.group} for rows of {columns}"
        raise refuse(f"{what}, packed {why}", "compressed-tensors", "linear layers in whole groups",
                     "allow --allow-dense")
    if format.symmetric:
        return False
    if allowed.requantize:
        return True
    if allowed.dense:
        return None
    raise refuse(f"{what} in {format.bits} bits with zero points that are no codes", "compressed-tensors",
                 "symmetric formats",
                 "allow --allow-requantize (rounded again), --allow-dense, or quantize with symmetric=true")


# configuration ---------------------------------------------------------------------------------


def quantization_config(spec: StackSpec, places: set[Place]) -> dict[str, Any]:
    """The entry in `config.json`: one group of modules per format."""
    groups: dict[Format, dict[str, list[int]]] = {}
    for layer, name in sorted(places):
        format = replace(spec.rows[layer].formats[name], symmetric=True)
        groups.setdefault(format, {}).setdefault(name, []).append(layer)
    entries = {f"group_{number}": {"targets": [_target(spec, name, layers) for name, layers in members.items()],
                                   "weights": _weights(format), "format": "pack-quantized"}
               for number, (format, members) in enumerate(groups.items())}
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
            "config_groups": entries, "ignore": ["lm_head"]}


def _weights(format: Format) -> dict[str, Any]:
    entry: dict[str, Any] = {"num_bits": format.bits, "type": "int", "symmetric": True, "dynamic": False}
    return entry | ({"strategy": "group", "group_size": format.group} if format.group else {"strategy": "channel"})


def _target(spec: StackSpec, name: str, layers: list[int]) -> str:
    """A pattern for one kind of matrix in several layers."""
    inner = module_names(spec)[layers[0], name].split(f".{layers[0]}.", 1)[1]
    return rf"re:.*layers\.({'|'.join(map(str, layers))})\.{re.escape(inner)}$"


def module_names(spec: StackSpec) -> dict[Place, str]:
    """The name in transformers of the module that holds each matrix of the dense model."""
    found: dict[Place, str] = {}
    for link in FAMILIES[spec.family]().links(_plain(spec)):
        parts = link.ours.split(".")
        if parts[0] == "layers" and parts[-1] == "weight" and parts[-2] in MATRICES and parts[-3] == "body":
            found.setdefault((int(parts[1]), parts[-2]), link.theirs.removesuffix(".weight"))
    return found


# tensors ---------------------------------------------------------------------------------------


@torch.inference_mode()
def _tensors(stack: DecoderStack, plain: StackSpec, again: Mapping[Place, bool]) -> Iterator[Named]:
    links = list(FAMILIES[plain.family]().links(plain))
    skip = {f"layers.{layer}.{MATRICES[name]}.body.{name}.weight" for layer, name in again}
    dense = in_table_dtype(dense_tensors(stack), plain)
    yield from to_family(((name, tensor) for name, tensor in dense if name not in skip), links)
    modules = module_names(plain)
    for (layer, name), anew in again.items():
        block = stack.block(layer)
        assert isinstance(block, Block)
        matrix = block.matrix(name)
        assert isinstance(matrix, PackedLinear)
        for part, tensor in _parts(matrix, anew).items():
            yield f"{modules[layer, name]}.{part}", tensor


def _parts(matrix: PackedLinear, anew: bool) -> dict[str, Tensor]:
    """What is stored of one packed matrix."""
    if anew:
        format = replace(matrix.format, symmetric=True)
        matrix = PackedLinear.from_codes(*rounded_by("search", matrix.dense(), format), format, matrix.bias)
    codes = matrix.state_dict()["codes"]
    stored = codes.view(torch.uint8) ^ 128 if codes.dtype == torch.int8 else codes
    parts = {"weight_packed": _words(stored), "weight_scale": matrix.scale.cpu(),
             "weight_shape": torch.tensor([matrix.out_features, matrix.in_features])}
    return parts | ({} if matrix.bias is None else {"bias": matrix.bias})


def _words(bytes_OS: Tensor) -> Tensor:
    """Rows of bytes as 32-bit words, filled up with zeros."""
    padded = F.pad(bytes_OS.cpu(), (0, -bytes_OS.shape[1] % WORD)).contiguous()
    return padded.view(torch.int32)


def _assets(stack: DecoderStack, folder: Path) -> None:
    for name in FILES if stack.tokenizer else ():
        if (stack.tokenizer.folder / name).exists():  # type: ignore[union-attr]
            shutil.copyfile(stack.tokenizer.folder / name, folder / name)  # type: ignore[union-attr]
