"""The engine that the commands for serving share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerwise.errors import BadOption

if TYPE_CHECKING:
    from layerwise.serve.engine import Engine


def engine(model: str, device: str | None, layers: Path | None, precision: str, *, dtype: str | None = None,
           **options: Any) -> Engine:
    """Open a model and serve it by a file of layers; `options` are the engine's. Raises what these raise."""
    from layerwise.serve.engine import Engine
    from layerwise.serve.table_file import read_table, streams
    from layerwise.stack.decoder import DecoderStack
    from layerwise.stack.open import open

    _check(device)
    stack = open(model, dtype=dtype, device=device, stream=streams(layers) or None)
    if isinstance(stack, DecoderStack):
        options["table"] = read_table(stack.spec, layers, precision)
    return Engine(stack, **options)


def _check(device: str | None) -> None:
    import torch

    try:
        usable = device is None or torch.device(device).type == "cpu" or (
            torch.device(device).type == "cuda" and (torch.device(device).index or 0) < torch.cuda.device_count())
    except RuntimeError:
        usable = False
    if not usable:
        raise BadOption(f"--device {device}", expected=f"cpu, or one of {torch.cuda.device_count()} GPUs of CUDA",
                        do="leave it out to compute on the processor")
