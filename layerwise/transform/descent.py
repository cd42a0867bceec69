"""Coordinate descent on codes and scales after GPTQ: every column once more, now knowing all the others.

Minimises tr(E H E'), E = W - W_rounded. GPTQ rounds each column knowing only the errors before it, and never
touches the scales. Here, group by group, each column takes the best code given all others (the nearest to
W_j + (sum_{k != j} E_k H_kj) / H_jj), and then the group's scale and zero take their least-squares values given
all codes, unless rounding them as they are stored undoes the gain. No step raises the error, and outputs do not
depend on one another.
Sources: the column step is that of Behdin et al., QuantEase, 2023 (arXiv 2309.01885); the scale step is least squares.

Shapes: O outputs, I inputs, G groups in a row, g inputs in a group, B inputs in a block.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from layerwise.spec import Format
from layerwise.transform.rounding import Grid, code_values, storable

BLOCK = 64
SWEEPS = 2


def descend(w_IO: Tensor, codes_IO: Tensor, grid: Grid, hessian_II: Tensor, format: Format,
            sweeps: int = SWEEPS) -> tuple[Tensor, Grid]:
    """Better codes [I, O] and grid [G, O] for float32 weights, for the damped Gram matrix H; new tensors.

    Every diagonal entry of H must be positive.
    """
    codes_IO = codes_IO.clone()
    grid = Grid(grid.scale.clone(), None if grid.zero is None else grid.zero.clone())
    error_IO = w_IO - code_values(codes_IO, grid, format)
    rounds = storable(grid, format)
    group = format.group or len(w_IO)
    for _ in range(sweeps):
        for index in range(len(grid.scale)):
            rows = slice(index * group, min((index + 1) * group, len(w_IO)))
            pull_gO = hessian_II[rows] @ error_IO
            here = Grid(grid.scale[index], None if grid.zero is None else grid.zero[index])
            _best_codes(w_IO[rows], codes_IO[rows], error_IO[rows], pull_gO, hessian_II[rows, rows], here, format.bits)
            _best_grid(codes_IO[rows] - 2 ** (format.bits - 1), error_IO[rows], pull_gO, hessian_II[rows, rows], here,
                       *rounds)
    return codes_IO, grid


def _best_codes(w_gO: Tensor, codes_gO: Tensor, error_gO: Tensor, pull_gO: Tensor, h_gg: Tensor, grid: Grid,
                bits: int) -> None:
    """One pass over a group's columns, changing codes, errors and `pull_gO`, the group's rows of H E, in place."""
    slope_O, offset_O, first_O = grid.line(bits)
    step_g = (1 / h_gg.diagonal()).tolist()
    for start in range(0, len(w_gO), BLOCK):
        block = slice(start, min(start + BLOCK, len(w_gO)))
        h_BB, pull_BO, codes_BO = h_gg[block, block], pull_gO[block], codes_gO[block]
        value_BO = w_gO[block] - error_gO[block]
        change_BO = torch.empty_like(value_BO)
        for j in range(len(value_BO)):
            pull_O = torch.addmv(pull_BO[j], change_BO[:j].T, h_BB[:j, j]) if j else pull_BO[0]
            target_O = torch.add(value_BO[j], pull_O, alpha=step_g[start + j])
            torch.addcmul(offset_O, target_O, slope_O, out=codes_BO[j]).round_().clamp_(0, 2**bits - 1)
            torch.sub(value_BO[j], torch.addcmul(first_O, codes_BO[j], grid.scale), out=change_BO[j])
        error_gO[block] += change_BO
        pull_gO.addmm_(h_gg[:, block], change_BO)


def _best_grid(q_gO: Tensor, error_gO: Tensor, pull_gO: Tensor, h_gg: Tensor, grid: Grid,
               to_scale: Callable[[Tensor], Tensor], to_zero: Callable[[Tensor], Tensor]) -> None:
    """Least-squares scale and zero of one group given all codes, in place, wherever that lowers the error.

    `q_gO` are codes minus the middle one; `to_scale` and `to_zero` round to what can be stored.
    """
    hq_gO = h_gg @ q_gO
    qq_O, qe_O = (q_gO * hq_gO).sum(0), (q_gO * pull_gO).sum(0)
    if grid.zero is None:
        scale_O = to_scale(grid.scale + _ratio(qe_O, qq_O))
        shift_gO = (grid.scale - scale_O) * q_gO
    else:
        ones, q1_O, e1_O = h_gg.sum(), hq_gO.sum(0), pull_gO.sum(0)
        scale_O = to_scale(grid.scale + _ratio(qe_O * ones - q1_O * e1_O, qq_O * ones - q1_O * q1_O))
        more_O = scale_O - grid.scale
        zero_O = to_zero(grid.zero + _ratio(e1_O - more_O * q1_O, ones))
        shift_gO = grid.zero - zero_O - more_O * q_gO
    lower_O = ((torch.addmm(2 * pull_gO, h_gg, shift_gO) * shift_gO).sum(0) < 0) & (scale_O > 0)
    error_gO += torch.where(lower_O, shift_gO, 0)
    grid.scale.copy_(torch.where(lower_O, scale_O, grid.scale))
    if grid.zero is not None:
        grid.zero.copy_(torch.where(lower_O, zero_O, grid.zero))


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    """above / below, and 0 where the denominator vanishes (equal codes)."""
    return torch.where(below > 0, above / below.clamp_min(1e-38), 0)
