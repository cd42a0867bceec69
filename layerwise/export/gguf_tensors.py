"""The tensors of a decoder as GGUF tensors: name, type, and bytes, one layer in memory at a time.

Values change on the way as llama.cpp expects: queries and keys of Llamas have the two halves of each head
interleaved, Gemma norms are stored with their one added, GPT-2 queries, keys and values are one matrix, and
experts get an axis of their own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from layerwise.export.base import Allowed, refuse
from layerwise.export.gguf_blocks import BLOCK, block_type, codes, encode, rounded_type
from layerwise.export.gguf_metadata import EMPTY_WIDTH, UNEVEN, architecture, llama3_rope
from layerwise.io.weights import expected_tensors
from layerwise.nets.decoder import MATRICES, Block
from layerwise.nets.flow import frequencies
from layerwise.nets.packed import PackedMatrix
from layerwise.spec import Attention, FeedForward, Format, Rope, StackSpec, Tiers
from layerwise.stack.decoder import DecoderStack

DENSE = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
OUTER = {"embedding": "token_embd", "positions": "position_embd", "norm": "output_norm", "head": "output"}
INNER = {
    "attention.norm": "attn_norm", "attention.post_norm": "post_attention_norm", "feed_forward.norm": "ffn_norm",
    "feed_forward.post_norm": "post_ffw_norm", "attention.body.q_norm": "attn_q_norm",
    "attention.body.k_norm": "attn_k_norm", "feed_forward.body.router": "ffn_gate_inp",
    "attention.body.q": "attn_q", "attention.body.k": "attn_k", "attention.body.v": "attn_v",
    "attention.body.o": "attn_output", "feed_forward.body.gate": "ffn_gate", "feed_forward.body.up": "ffn_up",
    "feed_forward.body.down": "ffn_down",
}
FUSED = ("q", "k", "v")


@dataclass(frozen=True)
class Item:
    """One tensor of the file.

    `layer` is None outside of layers; `ours` are its parts by our names (several where they are fused);
    `shape` is outermost first, `kind` a GGML type. `kept` is false where its values are rounded again.
    """

    name: str
    layer: int | None
    ours: tuple[str, ...]
    shape: tuple[int, ...]
    kind: str
    format: Format | None = None
    kept: bool = True

    @property
    def row_bytes(self) -> int:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        block, size = GGML_QUANT_SIZES[GGMLQuantizationType[self.kind]]
        return self.shape[-1] // block * size

    @property
    def bytes(self) -> int:
        return math.prod(self.shape[:-1]) * self.row_bytes

    @property
    def wider(self) -> bool:
        """Whether its type has more bits than its format."""
        return self.format is not None and self.kept and self.format.bits != int(self.kind[1])


def written_table(spec: StackSpec) -> StackSpec:
    """The table that the file will be read back as: no formats, and empty feed-forward halves filled up."""
    rows = tuple(replace(row, formats={}, ranks={}, feed_forward=row.feed_forward or FeedForward(EMPTY_WIDTH))
                 for row in spec.rows)
    return replace(spec, rows=rows, embedding_format=None, head_format=None)


def items(spec: StackSpec, allowed: Allowed) -> Iterator[Item]:
    """Every tensor of the file, in order; no weight is read.

    Raises BadOption naming the first matrix that has no type, and what to allow.
    """
    for name, (shape, _) in expected_tensors(written_table(spec)).items():
        stem, _, kind = name.rpartition(".")
        if not stem.startswith("layers."):
            yield from _outer(spec, stem, kind, shape, allowed)
        else:
            _, number, inner = stem.split(".", 2)
            yield from _inner(spec, int(number), inner, kind, shape, allowed)
    if llama3_rope(spec) is not None:
        width = next(row.mixer.head_dim for row in spec.rows if isinstance(row.mixer, Attention))
        yield Item("rope_freqs.weight", None, ("rope",), (width // 2,), "F32")


def _outer(spec: StackSpec, stem: str, kind: str, shape: tuple[int, ...], allowed: Allowed) -> Iterator[Item]:
    name = f"{OUTER[stem]}.{kind}"
    if stem in ("embedding", "head"):
        format = spec.embedding_format if stem == "embedding" else spec.head_format
        item = Item(name, None, (stem,), shape, DENSE[spec.dtype])
        if isinstance(format, Tiers):
            yield _tiers(item, format, f"the {stem}", allowed)
        else:
            yield _matrix(replace(item, format=format), f"the {stem}", allowed)
    else:
        yield Item(name, None, (stem,), shape, "F32")


def _inner(spec: StackSpec, layer: int, stem: str, kind: str, shape: tuple[int, ...],
           allowed: Allowed) -> Iterator[Item]:
    row, matrix = spec.rows[layer], stem.rpartition(".")[2]
    if spec.family == "gpt2" and matrix in FUSED:
        if matrix == "q":
            yield _fused(spec, layer, kind, shape, allowed)
        return
    experts = row.feed_forward.experts if row.feed_forward else 0
    stacked = experts and MATRICES.get(matrix) == "feed_forward"
    name = f"blk.{layer}.{INNER[stem]}{'_exps' if stacked else ''}.{kind}"
    if matrix not in MATRICES or kind == "bias":
        yield Item(name, layer, (stem,), shape, "F32")
        return
    shape = (experts, shape[0] // experts, shape[1]) if stacked else shape
    what = f"the matrix {matrix!r} of layer {layer}"
    if matrix in row.ranks and not allowed.dense:
        raise refuse(f"{what} as two factors of rank {row.ranks[matrix]}", "GGUF", "whole matrices",
                     "allow --allow-dense (their product, which takes more bytes)")
    format = None if matrix in row.ranks else row.formats.get(matrix)
    yield _matrix(Item(name, layer, (stem,), shape, DENSE[spec.dtype], format), what, allowed)


def _fused(spec: StackSpec, layer: int, kind: str, shape: tuple[int, ...], allowed: Allowed) -> Item:
    row = spec.rows[layer]
    parts = tuple(f"attention.body.{name}" for name in FUSED)
    name, whole = f"blk.{layer}.attn_qkv.{kind}", (3 * shape[0], *shape[1:])
    if kind == "bias":
        return Item(name, layer, parts, whole, "F32")
    formats = {row.formats.get(part) for part in FUSED}
    if (len(formats) > 1 or any(part in row.ranks for part in FUSED)) and not allowed.dense:
        raise refuse(f"q, k and v of layer {layer} stored in different ways", "a GPT-2 in GGUF",
                     "one format for the three, which are one matrix there", "allow --allow-dense")
    format = formats.pop() if len(formats) == 1 else None
    return _matrix(Item(name, layer, parts, whole, DENSE[spec.dtype], format), f"q, k and v of layer {layer}", allowed)


def _matrix(item: Item, what: str, allowed: Allowed) -> Item:
    if item.format is None:
        return item
    kind, kept = block_type(item.format, item.shape[-1], what, allowed)
    return replace(item, kind=kind, kept=kept) if kind else replace(item, format=None)


def _tiers(item: Item, format: Tiers, what: str, allowed: Allowed) -> Item:
    """A table whose rows differ: all of it in the wider type, or dense."""
    if allowed.requantize and item.shape[-1] % BLOCK == 0:
        return replace(item, kind=rounded_type(format.frequent.bits), format=format.frequent, kept=False)
    if not allowed.dense:
        raise refuse(f"{what} in {format.words}", "GGUF", "one type for a table",
                     "allow --allow-requantize (all of it in the wider one) or --allow-dense")
    return item


# data ------------------------------------------------------------------------------------------


def data(stack: DecoderStack, item: Item) -> np.ndarray[Any, Any]:
    """The bytes of one tensor, uint8 [..., bytes of a row]."""
    if item.ours == ("rope",):
        return _bytes(_divisors(stack.spec), item)
    parts = [_part(stack, item, ours) for ours in item.ours]
    packed = [part for part in parts if isinstance(part, PackedMatrix)]
    if item.format is not None and item.kept:
        encoded = [encode(codes(part).rows(_order(stack.spec, item, part.out_features)), item.kind, item.name)
                   for part in packed]
        return np.concatenate(encoded).reshape(*item.shape[:-1], -1)
    values = torch.cat([_values(part) for part in parts])
    return _bytes(values[_order(stack.spec, item, len(values))], item)


def _part(stack: DecoderStack, item: Item, ours: str) -> Any:
    """The module of a matrix, or the tensor of a vector."""
    kind = item.name.rpartition(".")[2]
    if item.layer is None:
        module = getattr(stack.decoder, ours)
        if ours in ("embedding", "head"):
            return module
        return _shifted(getattr(module, kind), stack.spec.final_norm.offset if ours == "norm" else 0.0)
    row, block = stack.spec.rows[item.layer], stack.block(item.layer)
    assert isinstance(block, Block)
    branch, _, name = ours.partition(".")
    if row.feed_forward is None and branch == "feed_forward":
        return torch.ones(item.shape) if name == "norm" else torch.zeros(item.shape)
    matrix = name.rpartition(".")[2]
    if matrix in MATRICES:
        module = block.matrix(matrix)
        return module if kind == "weight" else module.bias
    found: Tensor = block.get_submodule(ours).get_parameter(kind)
    return _shifted(found, row.norm.offset) if matrix.endswith("norm") else found


def _shifted(norm: Tensor, offset: float) -> Tensor:
    return norm.float() + offset


def _values(part: Any) -> Tensor:
    """A vector, or the numbers of a matrix however it is stored."""
    if isinstance(part, Tensor):
        return part.detach().cpu()
    found: Tensor = part.dense() if hasattr(part, "dense") else part.weight
    return found.detach().cpu()


def _order(spec: StackSpec, item: Item, rows: int) -> Tensor:
    """The rows in the order of the file."""
    order = torch.arange(rows)
    if item.layer is None or architecture(spec) not in ("llama", UNEVEN) or item.name.split(".")[-2] not in (
            "attn_q", "attn_k"):
        return order
    mixer = spec.rows[item.layer].mixer
    assert isinstance(mixer, Attention)
    return order.view(-1, 2, mixer.head_dim // 2).transpose(1, 2).flatten()


def _bytes(values: Tensor, item: Item) -> np.ndarray[Any, Any]:
    from gguf import GGMLQuantizationType, quantize

    plain = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    if item.kind in plain:
        raw = values.to(plain[item.kind]).contiguous().view(torch.uint8).numpy()
        return raw.reshape(*item.shape[:-1], item.row_bytes)
    found = quantize(values.float().contiguous().numpy(), GGMLQuantizationType[item.kind])
    return np.asarray(found).reshape(*item.shape[:-1], item.row_bytes)


def _divisors(spec: StackSpec) -> Tensor:
    """What the Llama 3.1 rule divides each frequency by."""
    rope = llama3_rope(spec)
    assert rope is not None
    width = next(row.mixer.head_dim for row in spec.rows if isinstance(row.mixer, Attention))
    return frequencies(Rope(rope.theta), width) / frequencies(rope, width)
