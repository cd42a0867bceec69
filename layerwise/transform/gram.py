"""Gram matrices of the inputs of a block's linear layers, summed over calibration states as they pass.

Shapes: N tokens, I inputs.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from layerwise.nets.decoder import Block
from layerwise.stack.base import State

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
    watched = [name for name in matrices if SAME_INPUT.get(name) not in matrices]
    handles = [matrices[name].register_forward_pre_hook(_adder(sums, name)) for name in watched]
    try:
        for state in states:
            block(state.hidden, state.shared, layer)
    finally:
        for handle in handles:
            handle.remove()
    return {name: sums[name if name in watched else SAME_INPUT[name]] for name in matrices}


def _adder(sums: dict[str, Tensor], name: str):  # type: ignore[no-untyped-def]
    def add(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        x_NI = args[0].reshape(-1, args[0].shape[-1]).float()
        gram_II = x_NI.T @ x_NI
        sums[name] = sums[name] + gram_II if name in sums else gram_II

    return add
