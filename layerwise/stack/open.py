"""`open`: any model, by name, folder, file or as a module, to a `Stack`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import torch
from torch import nn

from layerwise.io.source import read
from layerwise.registry import Registry
from layerwise.stack.base import Stack
from layerwise.stack.decoder import DecoderStack, load
from layerwise.stack.module import ModuleStack
from layerwise.stack.vision import is_vision_language, open_vision_language

TRAINED = Registry("trained demo", dict.fromkeys(("tiny-vlm", "tiny-vlm-quick"),
                                                "layerwise.train.vision_language:demo"))
"""Demo models that are trained here on first use: name to what makes the folder."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def open(source: str | Path | nn.Module, *, dtype: str | None = None,
         device: str | torch.device | None = None, stream: bool | None = None,
         blocks: Callable[[nn.Module], bool] | Sequence[str] | None = None) -> Stack:
    """Open a model to its layers.

    `source` is a Hugging Face folder or hub id, a `.gguf` file, a saved layer-table folder, the name of a
    demo model (`smollm2`, `gemma3-270m`, `tiny-vlm`), or any `torch.nn.Module`. Weights are memory-mapped: a layer is
    read when it first runs. `stream` reads layers from disk every time they run and keeps none; by default
    it is chosen when the stored weights exceed four fifths of the free memory. `dtype` is the stored one
    unless given. `blocks` names the layers of a module, or tests for them, where the lists of repeated
    blocks in it are not what is meant.

    Raises BadFile, BadModel, or UnknownName, each saying what to do.
    """
    if isinstance(source, nn.Module):
        return ModuleStack(source, blocks=blocks)
    if str(source) in TRAINED and not Path(source).exists():
        source = Path(TRAINED[str(source)](str(source)))
    if is_vision_language(source):
        return open_vision_language(source, device=torch.device(device) if device else None,
                                    dtype=DTYPES[dtype] if dtype else None)
    found = read(source, dtype=dtype)
    if stream is None:
        stream = found.spec.bytes() > 0.8 * psutil.virtual_memory().available and device is None
    decoder = load(found.spec, found.weights, stream=stream, device=torch.device(device) if device else None,
                   dtype=DTYPES[dtype] if dtype else None)
    return DecoderStack(decoder, name=found.name, tokenizer=found.tokenizer, folder=found.folder,
                        weights=found.weights if stream else None)
