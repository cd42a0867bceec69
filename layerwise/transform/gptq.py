"""GPTQ: round a matrix column by column, and let the columns not yet rounded make up for each error.

Minimises the error of the layer's outputs, tr(E H E') with E = W - W_rounded and H = sum(x x') over
calibration inputs. Columns are taken in order of decreasing H_ii (act-order); scales belong to contiguous
groups and are fixed before the first column is rounded.

With H = M diag(p) M' for unit upper triangular M, the error is sum_k p_k (E_k + sum_{j<k} E_j M_jk)^2, so column k
is rounded where W_k + sum_{j<k} E_j M_jk lies. That is GPTQ without an inverse (QuIP shows the two equal).
Sources: Frantar et al., GPTQ, 2022 (arXiv 2210.17323); Chee et al., QuIP, 2023 (arXiv 2307.13304), theorem 6.

Shapes: O outputs, I inputs, G groups in a row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from layerwise.errors import BadData
from layerwise.nets.packed import PackedLinear
from layerwise.spec import Format
from layerwise.transform.descent import descend
from layerwise.transform.rounding import (
    Grid,
    Rounded,
    check_finite,
    code_values,
    find_grid,
    joined,
    nearest_codes,
    stored,
)

BLOCK = 32
ROWS = 1 << 11
"""Outputs rounded at a time, so that what a token table needs meanwhile is no multiple of the table."""

DAMPING = 0.25
"""Of each input's own second moment. That much hardly costs anything on text like the calibration text, and on
other text, where inputs correlate otherwise, it is what keeps compensation from doing harm."""


@dataclass(frozen=True)
class Factor:
    """A damped Gram matrix H [I, I], the order in which inputs are rounded, its inverse, and M in that order."""

    hessian_II: Tensor
    order_I: Tensor
    back_I: Tensor
    unit_II: Tensor


def gptq(weight_OI: Tensor, gram_II: Tensor, format: Format, *, search: int = 0, sweeps: int = 0,
         block: int = BLOCK, damping: float = DAMPING, what: str = "the matrix") -> Rounded:
    """Codes, scales and zeros of `weight_OI` for inputs with Gram matrix `gram_II`.

    `search` refines the scales as in `round_to_nearest`, weighted by the diagonal of the Gram matrix; `sweeps`
    passes of coordinate descent follow. `damping`, a part of every input's own second moment, is added to
    the diagonal, and raised tenfold until the matrix can be factorised; inputs that were never active are
    rounded to nearest. A row that comes out no better than plain rounding keeps plain rounding, so the error
    is never larger. Matrices that read the same inputs are rounded faster as one, stacked on their outputs.
    Raises BadData where the Gram matrix is not finite or of another size, BadModel where weights are not finite.
    """
    check_finite(weight_OI, what)
    check_gram(gram_II, weight_OI.shape[1], what)
    gram_II = gram_II.float()
    factor = factorised(gram_II, damping)
    return joined([_rounded(part_OI.T.float().contiguous(), gram_II, factor, format, search, sweeps, block)
                   for part_OI in weight_OI.split(ROWS)])


def _rounded(w_IO: Tensor, gram_II: Tensor, factor: Factor, format: Format, search: int, sweeps: int,
             block: int) -> Rounded:
    plain = find_grid(w_IO, format, search, gram_II.diagonal())
    plain_IO = nearest_codes(w_IO, plain, format)
    codes_IO, grid = compensated(w_IO, factor, plain, format, block), plain
    if sweeps:
        codes_IO, grid = descend(w_IO, codes_IO, grid, factor.hessian_II, format, sweeps)
    better_O = _gain(w_IO, code_values(plain_IO, plain, format), code_values(codes_IO, grid, format), gram_II) > 0
    return stored(torch.where(better_O, codes_IO, plain_IO), plain.better(grid, better_O))


def factorised(gram_II: Tensor, damping: float = DAMPING) -> Factor:
    """Order and M of a Gram matrix with `damping` times its diagonal added, float32.

    Inputs are scaled to unit power before factorising, which keeps float32 exact enough. Inputs that were
    never active count as independent of all others.
    """
    power_I = gram_II.diagonal().float()
    order_I = power_I.argsort(descending=True, stable=True)
    last_I = order_I.flip(0)
    hessian_II = gram_II.float() + torch.diag(torch.where(power_I > 0, 0.0, 1.0))
    size_I = hessian_II.diagonal().sqrt()[last_I]
    scaled_II = hessian_II.index_select(0, last_I).index_select(1, last_I).div_(size_I[:, None]).div_(size_I)
    added = 0.0
    while True:
        scaled_II.diagonal().add_(damping - added)
        lower_II, failed = torch.linalg.cholesky_ex(scaled_II)
        if not failed:
            break
        added, damping = damping, 10 * damping
    unit_II = (lower_II / lower_II.diagonal()).mul_(size_I[:, None]).div_(size_I).flip(0, 1).contiguous()
    hessian_II.diagonal().mul_(1 + damping)
    return Factor(hessian_II, order_I, order_I.argsort(), unit_II)


def compensated(w_IO: Tensor, factor: Factor, grid: Grid, format: Format, block: int = BLOCK) -> Tensor:
    """Codes on a grid [G, O], float32 [I, O], each column making up for the errors of those before it."""
    slope_GO, offset_GO, first_GO = (part.unbind(0) for part in grid.line(format.bits))
    scale_GO, top = grid.scale.unbind(0), 2**format.bits - 1
    groups = torch.div(factor.order_I, format.group or len(w_IO), rounding_mode="floor").tolist()
    w_IO, unit_II = w_IO[factor.order_I], factor.unit_II
    codes_IO, error_IO = torch.empty_like(w_IO), torch.empty_like(w_IO)
    for start in range(0, len(w_IO), block):
        here = slice(start, min(start + block, len(w_IO)))
        target_BO = torch.addmm(w_IO[here], unit_II[:start, here].T, error_IO[:start])
        rows = (part.unbind(0) for part in (w_IO[here], target_BO, codes_IO[here], error_IO[here],
                                            unit_II[here, here].triu(1)))
        for group, w_O, target_O, code_O, error_O, later_B in zip(groups[here], *rows, strict=True):
            torch.addcmul(offset_GO[group], target_O, slope_GO[group], out=code_O).round_().clamp_(0, top)
            torch.sub(w_O, torch.addcmul(first_GO[group], code_O, scale_GO[group]), out=error_O)
            target_BO.addr_(later_B, error_O)
    return codes_IO[factor.back_I]


def output_error(weight_OI: Tensor, gram_II: Tensor, rounded: Rounded, format: Format) -> Tensor:
    """Each row's e' H e with e = w - w_rounded: its squared output error over the calibration inputs, [O]."""
    error_OI = weight_OI.float() - PackedLinear.from_codes(*rounded, format).dense()
    return ((error_OI @ gram_II.float()) * error_OI).sum(1)


def check_gram(gram_II: Tensor, inputs: int, what: str) -> None:
    """Raises BadData where a Gram matrix is not finite or of another size than the matrix it belongs to."""
    if gram_II.shape != (inputs, inputs) or not math.isfinite(float(gram_II.abs().amax())):
        raise BadData(f"a Gram matrix of shape {tuple(gram_II.shape)} for {what}, {inputs} inputs",
                      expected=f"finite numbers, [{inputs}, {inputs}]",
                      do="calibrate on this model, with weights and activations that are finite")


def _gain(w_IO: Tensor, before_IO: Tensor, after_IO: Tensor, gram_II: Tensor) -> Tensor:
    """By how much e' G e is lower after than before, [O]; a'Ga - b'Gb = (a - b)'G(a + b) takes one product."""
    change_IO, both_IO = after_IO - before_IO, (w_IO - before_IO).add_(w_IO).sub_(after_IO)
    return (gram_II @ both_IO).mul_(change_IO).sum(0)
