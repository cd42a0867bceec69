"""One attention head at a time: all other heads of its layer are scaled down or silenced.

    with only_head(stack, 12, 3):
        logits = stack(tokens_BT)

Heads are told apart where they still are: in the vector that enters the output projection.

Shapes: B rows, T tokens, W heads times head width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from layerwise.errors import BadOption
from layerwise.spec import Attention
from layerwise.stack.decoder import DecoderStack


@contextmanager
def only_head(stack: DecoderStack, layer: int, head: int, others: float = 0.0) -> Iterator[None]:
    """Multiply what every head of `layer` but `head` gives by `others` while the context lasts.

    Raises BadOption for a head that the layer does not have.
    """
    row = stack.spec.rows[stack.index(layer)].mixer
    heads = row.heads if isinstance(row, Attention) else 0
    if not 0 <= head < heads or not isinstance(row, Attention):
        raise BadOption(f"head {head} of layer {layer}, which has {heads}", expected="a head of the layer",
                        do="count heads from 0")
    mine = slice(head * row.head_dim, (head + 1) * row.head_dim)

    def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor]:
        mixed_BTW: Tensor = args[0]
        scaled_BTW = mixed_BTW * others
        scaled_BTW[..., mine] = mixed_BTW[..., mine]
        return (scaled_BTW,)

    output: nn.Module = stack.module(layer, "attention").body.o  # type: ignore[union-attr, assignment]
    handle = output.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()
