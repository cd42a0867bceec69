"""Rules for llama.cpp's own quantizer: which type each matrix gets, and which layers are pruned.

    llama-quantize $(cat rules.txt) model-bf16.gguf model.gguf Q8_0

The type named last, any quantized one, serves only matrices that no rule names. Rounding is llama.cpp's: the
same bits in its own block formats. It prunes first, so rules count the layers that are left.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from layerwise.export.base import NOTHING, Allowed, Export, Written, check_rows, names, refuse
from layerwise.export.gguf_tensors import INNER
from layerwise.export.source import Source
from layerwise.io import atomic
from layerwise.nets.decoder import MATRICES
from layerwise.spec import Format, LayerSpec, StackSpec, Tiers

SUPER = 256
"""Weights in a block of the K types; rows of other lengths get the older type of the same or more bits."""

K_TYPES = {2: "q2_k", 3: "q3_k", 4: "q4_k", 5: "q5_k", 6: "q6_k", 8: "q8_0"}
OLD_TYPES = {2: "q4_0", 3: "q4_0", 4: "q4_1", 5: "q5_1", 6: "q8_0", 8: "q8_0"}
DENSE = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}


class LlamaCppRules(Export):
    """Arguments of llama-quantize."""

    summary: ClassVar[str] = "arguments for llama-quantize --tensor-type"
    suffix: ClassVar[str] = ".txt"

    def write(self, source: Source, output: Path, allowed: Allowed = NOTHING) -> Written:
        """Write the arguments to `output`, separated by lines.

        Raises BadOption where a layer or matrix cannot be said; with `dense`, factors are left whole.
        """
        spec = source.spec
        check_rows(spec.rows, "llama-quantize")
        _same_shapes(source, allowed)
        lines = [f"--tensor-type {pattern}={kind}" for pattern, kind in tensor_types(spec).items()]
        lines += _tables(spec, allowed)
        if source.plan is not None and len(source.layers) < len(source.original.rows):
            gone = sorted(set(range(len(source.original.rows))) - set(source.layers))
            lines.append(f"--prune-layers {','.join(map(str, gone))}")
        atomic.write_text(output, "\n".join(lines) + "\n")
        return Written(output, output.stat().st_size, (f"{len(lines)} rules",))


def tensor_types(spec: StackSpec) -> dict[str, str]:
    """Pattern to type, lower case, for every matrix; layers as they are numbered after pruning."""
    found: dict[str, str] = {}
    for layer, name, row in names(spec.rows, spec.hidden):
        if spec.family == "gpt2" and name in ("q", "k", "v"):
            pattern = f"attn_{name}" if name != "q" else "attn_qkv"
            if name != "q":
                continue
        else:
            pattern = INNER[f"{MATRICES[name]}.body.{name}"]
        columns = row.matrices(spec.hidden)[name][1]
        format = None if name in row.ranks else row.formats.get(name)
        stacked = "_exps" if row.feed_forward and row.feed_forward.experts and MATRICES[name] == "feed_forward" else ""
        found[rf"^blk\.{layer}\.{pattern}{stacked}\.weight$"] = kind(format, columns, spec.dtype)
    return found


def kind(format: Format | None, columns: int, dtype: str) -> str:
    """llama.cpp's type of the same bits; the dense one where nothing is packed."""
    if format is None:
        return DENSE[dtype]
    return (K_TYPES if columns % SUPER == 0 else OLD_TYPES)[format.bits]


def _tables(spec: StackSpec, allowed: Allowed) -> list[str]:
    tables, lines = [("token-embedding", "embedding", spec.embedding_format)], []
    if not spec.tied:
        tables.append(("output-tensor", "head", spec.head_format))
    for option, name, format in tables:
        if isinstance(format, Tiers):
            if not allowed.dense:
                raise refuse(f"the {name} in {format.words}", "llama-quantize", "one type for a table",
                             "allow --allow-dense to leave it unpacked")
            format = None
        lines.append(f"--{option}-type {kind(format, spec.hidden, spec.dtype)}")
    return lines


def _same_shapes(source: Source, allowed: Allowed) -> None:
    """Raises BadOption where a row has factors, or other widths than the original it comes from."""
    before = source.original.rows if source.plan is not None else source.spec.rows
    for layer, (row, number) in enumerate(zip(source.spec.rows, source.layers, strict=True)):
        if row.ranks and not allowed.dense:
            raise refuse(f"factors of {', '.join(row.ranks)} in layer {layer}", "llama-quantize", "whole matrices",
                         "allow --allow-dense to leave them whole and unpacked")
        if _shape(row, source.spec.hidden) != _shape(before[number], source.spec.hidden):
            raise refuse(f"other widths in layer {layer}", "llama-quantize", "the widths of the original",
                         "export the model itself to gguf")


def _shape(row: LayerSpec, hidden: int) -> dict[str, tuple[int, int]]:
    return row.matrices(hidden)
