"""Data of any form as inputs to a stack, batch by batch, as often as needed.

Shapes: N rows, B rows of a batch, T tokens.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from layerwise.data.batch import Batch, check_tokens
from layerwise.data.module import Batches, Call, calls, labelled
from layerwise.data.text import TextData
from layerwise.errors import BadData, LayerwiseError
from layerwise.measure.memory import out_of_memory
from layerwise.stack.base import Stack, State
from layerwise.stack.decoder import DecoderStack
from layerwise.stack.module import ModuleStack

TOKENS = 2048
"""Tokens of a batch where the data leaves the choice: enough for full speed, little memory."""


@dataclass(frozen=True)
class Input:
    """One batch: the call that starts a pass, and for text its tokens and mask (True at real tokens).

    `labels_B` is the class of every row, for modules whose data has labels.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    tokens_BT: Tensor | None = None
    mask_BT: Tensor | None = None
    labels_B: Tensor | None = None

    def start(self, stack: Stack) -> State:
        return stack.start(*self.args, **self.kwargs)


class Inputs:
    """The batches of `data` for `stack`.

    For a decoder: a TextData, token ids [N, T], or batches as Batch, ids [B, T], (ids, mask) or a mapping
    with `input_ids` and perhaps `attention_mask`. For a module whatever `layerwise.data.module.calls` takes, with
    labels beside the inputs or without.
    `size` is the number of rows in a batch where the data does not say. Raises BadData for no data, or ids
    that are not the model's.
    """

    def __init__(self, stack: Stack, data: Any, size: int | None = None) -> None:
        self.stack, self.size = stack, size
        self.name = data.name if isinstance(data, TextData) else type(data).__name__
        if isinstance(data, TextData) and not size:
            self.size = max(1, TOKENS // data.length)
        if isinstance(data, Tensor):
            data = list(data.split(size or _rows(stack, data)))
        self.data = Batches(data).items if isinstance(data, Iterator) else data

    def __len__(self) -> int:
        """Number of batches; 1 where the data does not say."""
        if isinstance(self.data, TextData):
            return math.ceil(len(self.data) / (self.size or 8))
        return len(self.data) if isinstance(self.data, Sized) else 1

    def __iter__(self) -> Iterator[Input]:
        items = self._texts() if isinstance(self.stack, DecoderStack) else self._calls()
        empty = True
        for item in items:
            empty = False
            yield item
        if empty:
            raise BadData("data without a batch", expected="at least one batch",
                          do="check where the data comes from")

    def _texts(self) -> Iterator[Input]:
        batches = self.data.batches(self.size) if hasattr(self.data, "batches") else map(_batch, self.data)
        for batch in batches:
            check_tokens(batch.tokens_BT, self.stack.spec.vocabulary)
            mask_BT = None if batch.mask_BT is None or bool(batch.mask_BT.all()) else batch.mask_BT.bool()
            yield Input((batch.tokens_BT, mask_BT), batch.inputs, batch.tokens_BT, mask_BT)

    def _calls(self) -> Iterator[Input]:
        for found in calls(self.data, self.size or 8):
            call = labelled(found, self.stack.root) if isinstance(self.stack, ModuleStack) else found
            mask = call.kwargs.get("attention_mask")
            yield Input(call.args, call.kwargs, None, mask.bool() if isinstance(mask, Tensor) else None, call.labels_B)


def fingerprint(inputs: Iterable[Input]) -> tuple[str, int]:
    """A hash of all tokens, masks, labels and other inputs, and the number of real tokens, 0 without tokens."""
    digest, count = hashlib.sha256(), 0
    for item in inputs:
        if item.tokens_BT is None:
            given = [*enumerate(item.args), *sorted(item.kwargs.items()), ("labels", item.labels_B)]
            for name, value in given:
                if isinstance(value, Tensor):
                    digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
                    digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
            continue
        tokens_N = item.tokens_BT if item.mask_BT is None else item.tokens_BT[item.mask_BT]
        digest.update(repr(tuple(item.tokens_BT.shape)).encode() + tokens_N.cpu().numpy().tobytes())
        for name, value in sorted(item.kwargs.items()):
            digest.update(name.encode() + value.cpu().numpy().tobytes())
        count += tokens_N.numel()
    return digest.hexdigest()[:16], count


def _rows(stack: Stack, data: Tensor) -> int:
    return max(1, TOKENS // data.shape[-1]) if isinstance(stack, DecoderStack) else 8


def _batch(item: Any) -> Batch:
    if isinstance(item, Batch):
        return item
    if isinstance(item, Call):
        item = item.kwargs or item.args
    if isinstance(item, Mapping) and "input_ids" in item:
        item = item["input_ids"], item.get("attention_mask")
    tokens, mask = item if isinstance(item, (tuple, list)) and len(item) == 2 else (item, None)
    ids = isinstance(tokens, Tensor) and tokens.dim() == 2 and not tokens.is_floating_point()
    if not ids or not tokens.numel():
        given = f"{tuple(tokens.shape)} {tokens.dtype}" if isinstance(tokens, Tensor) else type(item).__name__
        raise BadData(f"a batch of {given}", expected="token ids, int64 [rows, tokens]",
                      do="give a TextData, a tensor of token ids, or batches with `input_ids`")
    return Batch(tokens.long(), None if mask is None else mask.bool())


def try_batch(stack: Stack, first: Input) -> None:
    """Run a module on one batch. Raises BadData, with the shapes that were given, where it fails on them."""
    try:
        stack(*first.args, **first.kwargs)
    except LayerwiseError:
        raise
    except Exception as error:
        if out_of_memory(error):
            raise
        given = [*(("", item) for item in first.args), *((f"{name}=", item) for name, item in first.kwargs.items())]
        shapes = ", ".join(name + (str(list(item.shape)) if isinstance(item, Tensor) else type(item).__name__)
                           for name, item in given)
        raise BadData(f"a first batch ({shapes}) on which {stack.name} fails: {type(error).__name__}: {error}",
                      expected="batches that its forward pass takes: a tensor, a tuple, or a mapping of names",
                      do="run the model on one batch in Python first; for text, check the tokenizer's folder"
                      ) from error
