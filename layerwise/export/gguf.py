"""GGUF: one file with per-tensor types, as llama.cpp and everything built on it opens it.

Packed matrices keep their codes wherever GGML has a type for them; see `gguf_blocks`. The file is read back
before it takes its place: its table must be the one that was written, and its weights those of the model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from layerwise.errors import BadFile
from layerwise.export.base import NOTHING, Allowed, Export, Written, check_keys
from layerwise.export.dense import dense_tensors
from layerwise.export.gguf_metadata import metadata
from layerwise.export.gguf_tensors import Item, data, items, written_table
from layerwise.export.gguf_tokenizer import no_tokenizer, tokenizer_metadata
from layerwise.export.source import Source
from layerwise.io import atomic
from layerwise.io.source import read_gguf
from layerwise.spec import StackSpec
from layerwise.stack.decoder import DecoderStack

if TYPE_CHECKING:
    from gguf import GGUFWriter

FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "BF16": 32}
"""What llama.cpp calls a file by the type that most of its weights have."""

ROUNDING, SMALLEST = 2**-10, 1e-5
"""How far a value read back may be off: offsets are rounded to float16, scales below its normal range too."""


class GGUF(Export):
    """The model as one GGUF file."""

    summary: ClassVar[str] = "a file for llama.cpp, with a type for every tensor"
    suffix: ClassVar[str] = ".gguf"

    def write(self, source: Source, output: Path, allowed: Allowed = NOTHING) -> Written:
        """Write `source` to the file `output`.

        Raises BadOption naming the first matrix or layer that GGUF cannot hold and what to allow, BadModel
        where the tokenizer has no name there, BadFile where the file read back is not the model.
        """
        for layer, row in enumerate(source.spec.rows):
            check_keys(layer, row, "GGUF")
        tensors = list(items(source.spec, allowed))
        facts = metadata(source.spec, source.name)
        stack = source.stack
        facts |= (tokenizer_metadata(stack.tokenizer.folder, stack.spec.vocabulary) if stack.tokenizer
                  else no_tokenizer(stack.spec.vocabulary))
        facts["general.file_type"] = _file_type(tensors)
        with atomic.file(output) as beside:
            _write(beside, facts, stack, tensors)
            _check(beside, stack, tensors)
        return Written(output, output.stat().st_size, _notes(tensors))


@torch.inference_mode()
def _write(path: Path, facts: Mapping[str, Any], stack: DecoderStack, tensors: Sequence[Item]) -> None:
    import numpy as np
    from gguf import GGMLQuantizationType, GGUFWriter

    writer = GGUFWriter(path, str(facts["general.architecture"]))
    for key, value in facts.items():
        if key != "general.architecture":
            _add(writer, key, value)
    for item in tensors:
        shape = (*item.shape[:-1], item.row_bytes)
        writer.add_tensor_info(item.name, shape, np.dtype(np.uint8), item.bytes, GGMLQuantizationType[item.kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for item in tensors:
        writer.write_tensor_data(data(stack, item))
    writer.close()


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    kinds: dict[type, Callable[[str, Any], None]] = {
        bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string,
        list: writer.add_array}
    if value != []:
        kinds[type(value)](key, value)


def _file_type(tensors: Sequence[Item]) -> int:
    sizes: Counter[str] = Counter()
    for item in tensors:
        sizes[item.kind] += item.bytes
    return FILE_TYPES[sizes.most_common(1)[0][0]]


@torch.inference_mode()
def _check(path: Path, stack: DecoderStack, tensors: Sequence[Item]) -> None:
    """Read the file back. Raises BadFile where its table or a tensor that was to be kept is not the model's."""
    found = read_gguf(path, "float32")
    differs = _comparable(written_table(stack.spec)).diff(_comparable(found.spec))
    if differs:
        raise BadFile(f"the GGUF file read back differs from {stack.name}: {differs[0]}",
                      expected="the same layer table", do="keep the model in layerwise's own format")
    found.weights.check()
    rounded = {f"layers.{item.layer}.{ours}.weight" for item in tensors if not item.kept for ours in item.ours}
    rounded |= {f"{ours}.weight" for item in tensors if not item.kept and item.layer is None for ours in item.ours}
    for name, tensor in dense_tensors(stack):
        difference = float((found.weights.tensor(name) - tensor.float().cpu()).abs().max())
        allowed = ROUNDING * float(tensor.abs().max()) + SMALLEST
        if name not in rounded and not difference <= allowed:
            raise BadFile(f"the tensor {name} of {stack.name} read back from the GGUF file is off by {difference:.3g}",
                          expected=f"at most {allowed:.3g}", do="report this with the layer table")


def _comparable(spec: StackSpec) -> StackSpec:
    """What the file must say about the model: all but names."""
    return replace(spec, family="", extras={}, dtype="float32")


def _notes(tensors: Sequence[Item]) -> tuple[str, ...]:
    kinds = Counter(item.kind for item in tensors if len(item.shape) > 1)
    notes = ["types: " + ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())]
    for what, chosen in (("in a wider type than their format", [item for item in tensors if item.wider]),
                         ("rounded again", [item for item in tensors if not item.kept])):
        if chosen:
            notes.append(f"{len(chosen)} {what}, such as {chosen[0].name} ({chosen[0].kind})")
    return tuple(notes)
