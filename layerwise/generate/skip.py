"""Which layers a decoded token runs: chosen from a target speed-up alone, or by simple rules to compare with.

Shapes: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from layerwise.errors import BadOption
from layerwise.stack.base import Stack, State


def unified(layers: int, speedup: float) -> tuple[int, ...]:
    """The evenly spread layers of Unified Layer Skipping (arXiv 2404.06954): int(layers / speedup) of them.

    The first and last layer are always kept; between them every step-th one until the quota is met. Raises
    BadOption where fewer than three layers would be left.
    """
    kept = int(layers / speedup) if speedup >= 1 else 0
    if kept < 3:
        raise BadOption(
            f"a speed-up of {speedup} for {layers} layers",
            expected=f"between 1 and {layers / 3:g}",
            do="ask for less, so that at least three layers run",
        )
    step = int(layers / (kept - 1))
    chosen = {0, layers - 1}
    for layer in range(1, layers - 1):
        if layer % step == 0 and len(chosen) < kept:
            chosen.add(layer)
    return tuple(sorted(chosen))


def first(layers: int, speedup: float) -> tuple[int, ...]:
    """The first layers only: what an early exit runs."""
    return tuple(range(len(unified(layers, speedup))))


def last(layers: int, speedup: float) -> tuple[int, ...]:
    """The last layers only."""
    return tuple(range(layers - len(unified(layers, speedup)), layers))


def without_middle(layers: int, speedup: float) -> tuple[int, ...]:
    """The outer layers, with one contiguous stretch in the middle left out."""
    kept = len(unified(layers, speedup))
    return tuple(range((kept + 1) // 2)) + tuple(range(layers - kept // 2, layers))


def at_random(layers: int, speedup: float, seed: int = 0) -> tuple[int, ...]:
    """As many layers as `unified` keeps, drawn at random."""
    kept = len(unified(layers, speedup))
    order = torch.randperm(layers, generator=torch.Generator().manual_seed(seed))
    return tuple(sorted(order[:kept].tolist()))


def run_layers(stack: Stack, state: State, layers: tuple[int, ...]) -> State:
    """Run only `layers` (ascending); every other layer is the identity."""
    for layer in layers:
        state = stack.run(state, slice(layer, layer + 1))
    return state.moved(state.hidden, len(stack))


def split_pass(stack: Stack, tokens_BT: Tensor, response_BT: Tensor, layers: tuple[int, ...]) -> Tensor:
    """Logits [B, T, V] when prompt tokens run all layers and response tokens only `layers`, in one pass.

    Equal to prefilling the prompt through every layer and then decoding the response through `layers`: in a
    skipped layer a response token passes unchanged, and no prompt token could have seen it.
    """
    state = stack.start(tokens_BT)
    for layer in range(len(stack)):
        after = stack.run(state, slice(layer, layer + 1))
        if layer not in layers:
            after = after.moved(torch.where(response_BT[..., None], state.hidden, after.hidden), after.layer)
        state = after
    logits: Tensor = stack.finish(state)
    return logits
