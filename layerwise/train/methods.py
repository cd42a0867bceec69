"""What healing trains: whole layers, the last few with the head, adapters, or the scales of packed matrices.

Each method prepares a float32 copy of the stack in place, so that exactly its parameters want gradients, and puts the
layers back as they are stored when training is over.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from layerwise.errors import BadOption, MissingExtra
from layerwise.nets.decoder import Block, Decoder
from layerwise.nets.tiered import PackedTable
from layerwise.stack.decoder import DecoderStack
from layerwise.train.scales import packed_again, trainable_scales


@dataclass(frozen=True)
class Partial:
    """Train the last `layers` layers, the final norm, and the head (untied first, so the embedding stays)."""

    layers: int = 3
    head: bool = True


@dataclass(frozen=True)
class Layers:
    """Train every parameter of `layers` (None: all of them) and the final norm; of packed matrices the scales."""

    layers: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Scales:
    """Train scales, zeros, norms and biases only; the numbers of dense matrices stay."""


@dataclass(frozen=True)
class Lora:
    """Train low-rank adapters on every dense matrix of every layer, through PEFT, and merge them at the end."""

    rank: int = 8
    alpha: int = 16
    dropout: float = 0.05


Method = Partial | Layers | Scales | Lora


def beside(kept: Sequence[int], reach: int = 2) -> tuple[int, ...]:
    """The layers of a student at most `reach` away from a gap in `kept`, on either side."""
    cuts = [index for index in range(1, len(kept)) if kept[index] != kept[index - 1] + 1]
    near = {layer for cut in cuts for layer in range(cut - reach, cut + reach)}
    return tuple(sorted(layer for layer in near if 0 <= layer < len(kept)))


def prepared(stack: DecoderStack, method: Method) -> DecoderStack:
    """A float32 copy in which exactly the parameters of `method` want gradients, in training mode.

    Raises BadOption for layers that are not there, or where nothing could be trained; MissingExtra without PEFT.
    """
    _check(stack, method)
    student = stack.copied(torch.float32)
    for name in ("embedding", "head"):
        table = getattr(student.decoder, name)
        if isinstance(table, PackedTable):
            setattr(student.decoder, name, nn.Embedding.from_pretrained(table.dense()))
    student.decoder.requires_grad_(False)
    if isinstance(method, Lora):
        _adapt(student, method)
    elif isinstance(method, Partial):
        student = _last(student, method)
    else:
        _choose(student, method)
    student.decoder.train()
    if not any(parameter.requires_grad for parameter in student.decoder.parameters()):
        raise BadOption(f"healing with {method}", expected="something to train", do="choose another method")
    return student


def stored(student: DecoderStack, stack: DecoderStack) -> DecoderStack:
    """What was learnt, in the form in which `stack` is stored; `student` is used up.

    Formats and dtype stay, and so does the number of bytes, but for a head that was untied to be trained.
    """
    _merge(student.decoder)
    packed_again(student.decoder)
    for name in ("embedding", "head"):
        if isinstance(table := getattr(stack.decoder, name), PackedTable):
            setattr(student.decoder, name, table)
    healed = student.copied(stack.dtype)
    healed.decoder.requires_grad_(False).eval()
    return healed


def untied(stack: DecoderStack) -> DecoderStack:
    """The same model with a head of its own: a copy of the embedding."""
    if not stack.spec.tied:
        return stack
    embedding = stack.decoder.embedding
    assert isinstance(embedding, nn.Embedding)
    head = nn.Embedding.from_pretrained(embedding.weight.detach().clone())
    return stack.rebuilt(replace(stack.spec, tied=False), list(stack.decoder.layers), head=head)


def _check(stack: DecoderStack, method: Method) -> None:
    count = len(stack)
    if isinstance(method, Partial) and not 0 <= method.layers <= count:
        raise BadOption(f"healing {method.layers} of {count} layers", expected=f"0 to {count}",
                        do="choose how many of the last layers to train")
    if isinstance(method, Layers) and method.layers is not None:
        wrong = [layer for layer in method.layers if not 0 <= layer < count]
        if wrong or not method.layers:
            raise BadOption(f"healing layers {list(method.layers)}", expected=f"layers within 0..{count - 1}",
                            do="count layers from 0, as they are in the smaller model")
    tables = stack.spec.embedding_format, stack.spec.head_format
    if isinstance(method, Partial) and method.head and any(tables):
        raise BadOption("training a packed head", expected="a dense head, or head=False",
                        do="use Partial(head=False), or Layers()")
    if isinstance(method, Lora) and any(row.formats for row in stack.spec.rows):
        raise BadOption("adapters on packed matrices, into which they cannot be merged", expected="dense matrices",
                        do="use Layers() or Scales(), which train the scales of packed matrices")


def _last(student: DecoderStack, method: Partial) -> DecoderStack:
    layers = [student.block(layer) for layer in range(len(student) - method.layers, len(student))]
    for block in layers:
        trainable_scales(block)
        block.requires_grad_(True)
    student.decoder.norm.requires_grad_(True)
    if method.head:
        student = untied(student)
        assert student.decoder.head is not None
        student.decoder.head.requires_grad_(True)
    return student


def _choose(student: DecoderStack, method: Layers | Scales) -> None:
    chosen = method.layers if isinstance(method, Layers) else None
    for layer in range(len(student)) if chosen is None else chosen:
        block = student.block(layer)
        trainable_scales(block)
        for module in block.modules():
            for name, parameter in module.named_parameters(recurse=False):
                matrix = parameter.dim() > 1 and name == "weight"
                parameter.requires_grad_(isinstance(method, Layers) or not matrix)
    student.decoder.norm.requires_grad_(True)


def _adapt(student: DecoderStack, method: Lora) -> None:
    """Put PEFT adapters on every dense matrix, in place; only they are trainable."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise MissingExtra("peft", "peft", "healing with adapters") from error
    targets = [name for name, module in student.decoder.named_modules()
               if isinstance(module, nn.Linear) and name.startswith("layers.") and not name.endswith(".router")]
    config = LoraConfig(r=method.rank, lora_alpha=method.alpha, lora_dropout=method.dropout, target_modules=targets)
    inject_adapter_in_model(config, student.decoder)


def _merge(decoder: Decoder) -> None:
    """Fold the adapters into the matrices and put the plain linear layers back."""
    for block in decoder.layers:
        assert isinstance(block, Block)
        for name, module in list(block.named_modules()):
            if hasattr(module, "base_layer") and hasattr(module, "merge"):
                module.merge()
                parent, _, last = name.rpartition(".")
                setattr(block.get_submodule(parent), last, module.base_layer)
