"""Gram matrices of the inputs of a block's linear layers, summed over calibration states as they pass.

Shapes: N tokens, I inputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from layerwise.nets.decoder import Block
from layerwise.stack.base import State
from layerwise.stack.decoder import DecoderStack
from layerwise.transform.moments import mirrored, watching, with_outer

SAME_INPUT = {"k": "q", "v": "q", "up": "gate"}


@torch.inference_mode()
def grams(block: Block, layer: int, states: Iterable[State]) -> dict[str, Tensor]:
    """Sum of x x^T over all real tokens of `states`, [I, I] float32, by matrix name.

    Matrices that read the same input share one tensor. Padding is left out. Routed experts
    see only their own tokens, so their stacked matrices have no common Gram matrix and are left out.
    """
    routed = block.feed_forward is not None and hasattr(block.feed_forward.body, "router")
    matrices = {name: module for name, module in block.matrices().items()
                if not (routed and name in ("gate", "up", "down"))}
    sums: dict[str, Tensor] = {}
    watched = {name: module for name, module in matrices.items() if SAME_INPUT.get(name) not in matrices}

    real_N: Tensor | None = None

    def add(name: str, x_NI: Tensor) -> None:
        if real_N is not None:
            x_NI = x_NI[real_N]
        sums[name] = with_outer(sums.get(name), x_NI.float())

    with watching(watched, add):
        for state in states:
            valid_BS = getattr(state.shared, "valid_BS", None)
            real_N = None if valid_BS is None else valid_BS[:, -state.hidden.shape[1] :].flatten()
            block(state.hidden, state.shared, layer)
    sums = {name: mirrored(sum_II) for name, sum_II in sums.items()}
    return {name: sums[name if name in watched else SAME_INPUT[name]] for name in matrices}


@torch.inference_mode()
def normed(stack: DecoderStack, states: Iterable[State]) -> Iterator[Tensor]:
    """What the head multiplies, [N, C] of real tokens, for every state that has passed all layers."""
    for state in states:
        valid_BS = state.shared.valid_BS
        x_NC = stack.decoder.norm(state.hidden).flatten(0, 1)
        yield x_NC if valid_BS is None else x_NC[valid_BS[:, -state.hidden.shape[1] :].flatten()]
