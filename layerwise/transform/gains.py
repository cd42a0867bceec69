"""How much an error in each output of a matrix counts, by what stands between the matrix and the residual stream.

Where a half of a block is normed once more before it joins the stream (Gemma), channel c of its last matrix is
multiplied by that norm's weight for c, and these differ by orders of magnitude; what all channels are divided by does
not. Elsewhere all outputs count the same.

Shapes: O outputs, I inputs.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from layerwise.nets.decoder import Block

LAST = ("o", "out_proj", "down")
"""Matrices that write what their half of a block gives."""
LEAST = 1e-3
"""Of the largest gain; smaller ones count as this, so that outputs can be divided by them."""


def gains(block: Block, name: str) -> Tensor | None:
    """The gain of every output of the matrix `name`, [O] float32 and positive; None where all are the same."""
    norm: Any = block.branch(name).post_norm
    if norm is None or name not in LAST:
        return None
    gain_O: Tensor = (norm.weight.detach().float() + getattr(norm, "offset", 0.0)).abs()
    return gain_O.clamp(min=LEAST * float(gain_O.max())) if bool(gain_O.any()) else None


def gained(weight_OI: Tensor, gain_O: Tensor | None) -> Tensor:
    """The weight with every output times its gain; the same where there is none."""
    return weight_OI if gain_O is None else weight_OI.float() * gain_O.to(weight_OI.device)[:, None]
