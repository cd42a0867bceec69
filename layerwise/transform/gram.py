"""Gram matrices of the inputs of a block's linear layers, summed over calibration states as they pass.

Shapes: N tokens, I inputs.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from layerwise.nets.decoder import Block
from layerwise.stack.base import State
from layerwise.transform.moments import watching

SAME_INPUT = {"k": "q", "v": "q", "up": "gate"}


@torch.inference_mode()
def grams(block: Block, layer: int, states: Iterable[State]) -> dict[str, Tensor]:
    """Sum of x x^T over all tokens of `states`, [I, I] float32, by matrix name.

    Matrices that read the same input share one tensor. Padded tokens count like others. Routed experts
    see only their own tokens, so their stacked matrices have no common Gram matrix and are left out.
    """
    routed = block.feed_forward is not None and hasattr(block.feed_forward.body, "router")
    matrices = {name: module for name, module in block.matrices().items()
                if not (routed and name in ("gate", "up", "down"))}
    sums: dict[str, Tensor] = {}
    watched = {name: module for name, module in matrices.items() if SAME_INPUT.get(name) not in matrices}

    def add(name: str, x_NI: Tensor) -> None:
        gram_II = x_NI.float().T @ x_NI.float()
        sums[name] = sums[name] + gram_II if name in sums else gram_II

    with watching(watched, add):
        for state in states:
            block(state.hidden, state.shared, layer)
    return {name: sums[name if name in watched else SAME_INPUT[name]] for name in matrices}
