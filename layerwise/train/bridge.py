"""Make up for layers that were left out by least squares, before any gradient is taken.

From the first gap on, what the feed-forward half of a layer writes is fitted so that the hidden state becomes that of
the original at the same depth, beyond the layers that are gone:

    W <- W + D' A (A' A + ridge)^-1

with A [N, I] what enters the half's last matrix and D [N, C] what the state behind it lacks. Tokens are divided by the
size of the original's state, as the next norm does, since a few tokens with huge states would rule otherwise. Layer
follows layer, so that each makes up for what those before it could not. Every other block decides on the ridge, and
whether a matrix is changed at all.
Source: Shopkhoev et al., ReplaceMe, 2025 (arXiv 2505.02819), who put a linear map behind the layer before a cut and
fold it into that matrix; fitting the matrix itself, and at later layers too, is ours.

Shapes: N tokens, I inputs, C hidden width, B rows, T tokens of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from layerwise.nets.decoder import Block
from layerwise.nets.dense import Dense
from layerwise.nets.feed_forward import FeedForward
from layerwise.stack.base import State
from layerwise.stack.decoder import DecoderStack
from layerwise.transform.closed_form import ridged
from layerwise.transform.moments import watching

RIDGES = (1.0, 0.1, 0.01)
"""Parts of the mean of the diagonal of A' A that are tried."""


@torch.inference_mode()
def bridged(stack: DecoderStack, original: DecoderStack, tokens_NT: Tensor, kept: Sequence[int]
            ) -> tuple[DecoderStack, list[int]]:
    """A stack whose layers make up for those of `original` that are not in `kept`, and the layers that changed.

    `kept` is the layer of the original that each layer of `stack` was; at least two blocks of tokens are needed. Layers
    without a gap before or at them stay, as do packed matrices, experts, and halves with a norm behind them. Matrices
    that change are the new stack's own; everything else is shared with `stack`.
    """
    count = len(stack)
    until = [*kept[1:], len(original)]
    first = next((layer for layer in range(count) if until[layer] != kept[layer] + 1), count)
    first = 0 if kept and kept[0] > 0 else first
    if first == count or len(tokens_NT) < 2:
        return stack, []
    new = stack.rebuilt(stack.spec, [stack.block(layer) for layer in range(count)])
    ours = [new.run(new.start(row_1T), slice(None, first)) for row_1T in tokens_NT.split(1)]
    theirs = [original.start(row_1T) for row_1T in tokens_NT.split(1)]
    changed = []
    for layer in range(first, count):
        theirs = [original.run(state, slice(None, until[layer])) for state in theirs]
        block = cast(Block, new.block(layer))
        matrix = _last_matrix(block)
        if matrix is None:
            ours = [new.run(state, slice(layer, layer + 1)) for state in ours]
            continue
        ours, inputs = _passed(new, ours, layer, matrix)
        halves = Sums(), Sums()
        for row, (state, target, x_NI) in enumerate(zip(ours, theirs, inputs, strict=True)):
            wanted_NC = target.hidden.flatten(0, 1).float()
            scale_N1 = wanted_NC.norm(dim=1, keepdim=True).clamp_min(1e-6).reciprocal()
            halves[row % 2].add(x_NI.float() * scale_N1, (wanted_NC - state.hidden.flatten(0, 1).float()) * scale_N1)
        change_CI = fitted(*halves)
        if change_CI is None:
            continue
        ours = [state.moved(state.hidden + (x_NI.float() @ change_CI.T).view_as(state.hidden).to(state.hidden.dtype),
                            layer + 1) for state, x_NI in zip(ours, inputs, strict=True)]
        weight_CI = (matrix.weight.float() + change_CI).to(matrix.weight.dtype)
        new.decoder.layers[layer] = block.with_matrices({"down": Dense.of(weight_CI, matrix.bias)})
        changed.append(layer)
    return new, changed


class Sums:
    """A' A [I, I] and D' A [C, I] of the rows seen, float32."""

    def __init__(self) -> None:
        self.gram_II: Tensor | float = 0.0
        self.cross_CI: Tensor | float = 0.0

    def add(self, a_NI: Tensor, d_NC: Tensor) -> None:
        """Add rows."""
        self.gram_II = self.gram_II + a_NI.T @ a_NI
        self.cross_CI = self.cross_CI + d_NC.T @ a_NI

    def __add__(self, other: Sums) -> Sums:
        found = Sums()
        found.gram_II, found.cross_CI = self.gram_II + other.gram_II, self.cross_CI + other.cross_CI
        return found

    def solved(self, ridge: float) -> Tensor | None:
        """D' A (A' A + ridge)^-1, [C, I]; None where it cannot be found."""
        assert isinstance(self.gram_II, Tensor) and isinstance(self.cross_CI, Tensor)
        lower_II, failed = torch.linalg.cholesky_ex(ridged(self.gram_II, ridge).float())
        return None if int(failed) else torch.cholesky_solve(self.cross_CI.T, lower_II).T

    def gained(self, change_CI: Tensor) -> float:
        """By how much the change lowers the squared error |D|^2 of these rows."""
        assert isinstance(self.gram_II, Tensor) and isinstance(self.cross_CI, Tensor)
        return float(2 * (change_CI * self.cross_CI).sum() - (change_CI @ self.gram_II * change_CI).sum())


def fitted(one: Sums, other: Sums) -> Tensor | None:
    """The change found on all rows, with the ridge for which what was found on `one` helps `other` most; None where
    nothing does."""
    gains = {}
    for ridge in RIDGES:
        change_CI = one.solved(ridge)
        if change_CI is not None:
            gains[ridge] = other.gained(change_CI)
    best = max(gains, key=gains.__getitem__, default=None)
    return None if best is None or not gains[best] > 0 else (one + other).solved(best)


def _passed(stack: DecoderStack, states: list[State], layer: int,
            matrix: nn.Module) -> tuple[list[State], list[Tensor]]:
    """The states behind one layer, and what entered a matrix of it on the way, [N, I] of each."""
    inputs: list[Tensor] = []
    with watching({"": matrix}, lambda _, x_NI: inputs.append(x_NI)):
        return [stack.run(state, slice(layer, layer + 1)) for state in states], inputs


def _last_matrix(block: Block) -> nn.Linear | None:
    """The matrix through which the feed-forward half writes to the stream; None where it is not a dense one."""
    branch = block.feed_forward
    if branch is None or branch.post_norm is not None or not isinstance(branch.body, FeedForward):
        return None
    matrix = block.matrix("down")
    return matrix if isinstance(matrix, nn.Linear) else None
