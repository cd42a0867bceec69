"""What an alternative for one matrix does to its outputs, from its weights and the Gram matrix of its inputs alone.

All errors are tr(E G E') = sum over calibration tokens of |E x|^2, with E = W - W' and G = sum(x x'), so they compare
across alternatives of one matrix; divide by `energy` to compare matrices. Nothing is built or stored.

Shapes: O outputs, I inputs, K the smaller of the two, N units.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from layerwise.nets.packed import PackedLinear
from layerwise.spec import Format
from layerwise.transform.gains import gained
from layerwise.transform.gptq import factorised
from layerwise.transform.gptq import output_error as error_rows
from layerwise.transform.low_rank import axes, core
from layerwise.transform.narrow import damped, ranked
from layerwise.transform.quantize import SEARCH_STEPS, SWEEPS, Method
from layerwise.transform.rounding import round_to_nearest

DESCENT = 0.9
"""What descent leaves of GPTQ's error: 0.85 to 0.97 over matrices of SmolLM2 at 8 to 3 bits."""


def energy(weight_OI: Tensor, gram_II: Tensor) -> float:
    """Sum of squares of all outputs: the error of a matrix of zeros."""
    weight_OI = weight_OI.float()
    return float(((weight_OI @ gram_II.float()) * weight_OI).sum())


def spread(gram_II: Tensor) -> Tensor:
    """What an error of 1 in one input, once GPTQ has let later inputs make up for it, adds to the outputs', [I].

    GPTQ rounds so that E M = e with e the errors of rounding, taken as independent; then tr(E G E') is expected to
    be the sum of e^2 times the diagonal of M^-1 G M^-T. One factorisation for all matrices with these inputs.
    """
    factor, gram_II = factorised(gram_II), gram_II.float()
    inverse_II = torch.linalg.solve_triangular(factor.unit_II, torch.eye(len(gram_II)).to(gram_II), upper=True)
    ordered_II = gram_II[factor.order_I][:, factor.order_I]
    spread_I: Tensor = ((inverse_II @ ordered_II) * inverse_II).sum(1)
    return spread_I[factor.back_I].clamp(min=0)


@torch.no_grad()
def rounding_error(weight_OI: Tensor, gram_II: Tensor, format: Format, method: Method = "nearest",
                   spread_I: Tensor | None = None) -> float:
    """The error of rounding to `format`: exact for `nearest` and `search`, expected for `gptq` and `descent`.

    For GPTQ that is step^2 / 12 (or the plain error, where clipping makes it larger) times `spread_I`, in each row
    at most the plain error. At 2 bits it is too low by a tenth to a third, as what GPTQ moves is clipped. Pass
    `spread(gram_II)` to share it among formats.
    """
    importance_I = None if method == "nearest" else gram_II.diagonal()
    rounded = round_to_nearest(weight_OI, format, search=0 if method == "nearest" else SEARCH_STEPS,
                               importance_I=importance_I)
    plain_O = error_rows(weight_OI, gram_II, rounded, format)
    if method not in SWEEPS:
        return float(plain_O.sum())
    spread_I = spread(gram_II) if spread_I is None else spread_I
    group_I = torch.arange(weight_OI.shape[1], device=weight_OI.device) // (format.group or weight_OI.shape[1])
    even_O = (rounded[1].float()[:, group_I] ** 2 / 12) @ spread_I
    error_OI = weight_OI.float() - PackedLinear.from_codes(*rounded, format).dense()
    expected_O = torch.maximum(even_O, error_OI.square() @ spread_I) * (DESCENT if method == "descent" else 1.0)
    return float(torch.minimum(plain_O, expected_O).sum())


@torch.no_grad()
def low_rank_errors(weight_OI: Tensor, gram_II: Tensor | None = None) -> Tensor:
    """The least error that any matrix of rank R can have, for R = 0 to K at once, float64 [K + 1].

    The tail sums of squared singular values of W L with G = L L', as eigenvalues of W G W'; without a Gram matrix,
    of W itself.
    """
    gram_II = None if gram_II is None else gram_II.float()
    square_KK = core(weight_OI.float(), gram_II)[1].double()
    return _tails(torch.linalg.eigvalsh((square_KK + square_KK.T) / 2).flip(0).clamp(min=0))


@torch.no_grad()
def rank_errors(weight_OI: Tensor, gram_II: Tensor, ranks: Sequence[int], felt_O: Tensor) -> list[float]:
    """The error of the factors of each rank that are best for W, where it counts `felt_O` times in each output."""
    weight_OI = weight_OI.double()
    _, axes_OK = axes(weight_OI, gram_II.double())
    left = (weight_OI - axes_OK[:, :rank] @ (axes_OK[:, :rank].T @ weight_OI) for rank in ranks)
    return [energy(gained(left_OI, felt_O), gram_II) for left_OI in left]


@torch.no_grad()
def narrow_errors(weight_OI: Tensor, gram_II: Tensor, unit: int = 1, felt_O: Tensor | None = None
                  ) -> tuple[Tensor, Tensor]:
    """(errors, order): the error with the n best units of inputs kept and refitted, for n = 0 to N at once, float64
    [N + 1], and the units from the best to the first to go, [N]. In each output it counts `felt_O` times.

    With G = L L' in that order, the error of keeping n is the sum of squares of columns n to N of W L. The Gram
    matrix is damped as in refitting, which puts errors a little above those on the inputs themselves.
    """
    order_N = ranked(weight_OI, gram_II, unit)
    order_I = (order_N[:, None] * unit + torch.arange(unit, device=order_N.device)).flatten()
    lower_II = torch.linalg.cholesky(damped(gram_II)[order_I][:, order_I])
    energy_I = (gained(weight_OI, felt_O).double()[:, order_I] @ lower_II).square().sum(0)
    return _tails(energy_I.view(len(order_N), unit).sum(1)), order_N


def _tails(part_K: Tensor) -> Tensor:
    """Sums of everything from place n on, for n = 0 to K, [K + 1]."""
    return torch.cat([part_K.flip(0).cumsum(0).flip(0), part_K.new_zeros(1)])


def unseen(inputs: int, tokens: int) -> float:
    """How much larger errors are on new text than on the tokens that so many inputs were refitted on.

    (N / (N - K))^2: least squares with K unknowns leave 1 - K / N of the noise on the N samples they have seen, and
    1 / (1 - K / N) of it on others. Tokens of one text are alike, so this is a lower bound. Not a number where there
    are no more tokens than inputs, which then say nothing of other text.
    """
    return (tokens / (tokens - inputs)) ** 2 if tokens > inputs else math.nan
