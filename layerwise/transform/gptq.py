"""GPTQ: round a matrix column by column, and let the columns not yet rounded make up for each error.

Minimises the error of the layer's outputs, tr(E H E') with E = W - W_rounded and H = sum(x x') over
calibration inputs. Columns are taken in order of decreasing H_ii (act-order); scales belong to contiguous
groups and are fixed before the first column is rounded.
Source: Frantar et al., GPTQ, 2022 (arXiv 2210.17323).

Shapes: O outputs, I inputs, G groups in a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from layerwise.errors import BadData
from layerwise.nets.packed import PackedLinear
from layerwise.spec import Format
from layerwise.transform.rounding import Rounded, code_value, nearest_code, round_to_nearest

BLOCK = 128
DAMPING = 0.01


def gptq(weight_OI: Tensor, gram_II: Tensor, format: Format, *, search: int = 0, block: int = BLOCK,
         damping: float = DAMPING, what: str = "the matrix") -> Rounded:
    """Codes, scales and zeros of `weight_OI` for inputs with Gram matrix `gram_II`.

    `search` refines the scales as in `round_to_nearest`, weighted by the diagonal of the Gram matrix.
    `damping`, a part of the mean diagonal, is added to it, and raised tenfold until the matrix can be
    factorised; inputs that were never active are rounded to nearest. A row that comes out no better than
    plain rounding keeps plain rounding, so the error is never larger. Raises BadData where the Gram matrix
    is not finite or of another size, and BadModel where weights are not finite.
    """
    check_gram(weight_OI, gram_II, what)
    diagonal_I = gram_II.diagonal().float()
    rounded = round_to_nearest(weight_OI, format, search=search, importance_I=diagonal_I, what=what)
    order_I = diagonal_I.argsort(descending=True, stable=True)
    group_I = torch.div(order_I, format.group or len(order_I), rounding_mode="floor")
    scale_IO = rounded[1].float().T[group_I]
    zero_IO = None if rounded[2] is None else rounded[2].float().T[group_I]
    factor_II = inverse_factor(gram_II[order_I][:, order_I], damping).float()
    codes_IO = _compensated(weight_OI.float().T[order_I], factor_II, scale_IO, zero_IO, format.bits, block)
    codes_OI = codes_IO[order_I.argsort()].T.to(torch.uint8)
    return _better_rows(weight_OI, gram_II, codes_OI, rounded, format), rounded[1], rounded[2]


def inverse_factor(gram_II: Tensor, damping: float) -> Tensor:
    """Upper triangular U with U' U = (H / mean(diag H) + damping * 1)^-1, float64.

    With H = R R' for upper triangular R (the Cholesky factor of H in reversed order), U = R^-1. Inputs that
    were never active count as independent of all others.
    """
    gram_II = gram_II.double()
    diagonal_I = gram_II.diagonal()
    dead_I = diagonal_I <= 0
    mean = float(diagonal_I[~dead_I].mean()) if bool((~dead_I).any()) else 1.0
    gram_II = gram_II / mean + torch.diag(dead_I.double())
    eye_II = torch.eye(len(gram_II), dtype=torch.float64, device=gram_II.device)
    while True:
        lower_II, failed = torch.linalg.cholesky_ex((gram_II + damping * eye_II).flip(0, 1))
        if not failed:
            factor_II: Tensor = torch.linalg.solve_triangular(lower_II, eye_II, upper=False).flip(0, 1)
            return factor_II
        damping *= 10


def _compensated(w_IO: Tensor, factor_II: Tensor, scale_IO: Tensor, zero_IO: Tensor | None, bits: int,
                 block: int) -> Tensor:
    """Codes for the inputs in order; `w_IO` is changed in place, block by block."""
    codes_IO = torch.empty_like(w_IO)
    for start in range(0, len(w_IO), block):
        stop = min(start + block, len(w_IO))
        error_IO = torch.empty_like(w_IO[start:stop])
        for index in range(start, stop):
            zero_O = None if zero_IO is None else zero_IO[index]
            codes_IO[index] = nearest_code(w_IO[index], scale_IO[index], zero_O, bits)
            value_O = code_value(codes_IO[index], scale_IO[index], zero_O, bits)
            error_O = (w_IO[index] - value_O) / factor_II[index, index]
            w_IO[index + 1 : stop].addr_(factor_II[index, index + 1 : stop], error_O, alpha=-1)
            error_IO[index - start] = error_O
        w_IO[stop:].addmm_(factor_II[start:stop, stop:].T, error_IO, alpha=-1)
    return codes_IO


def output_error(weight_OI: Tensor, gram_II: Tensor, rounded: Rounded, format: Format) -> Tensor:
    """Each row's e' H e with e = w - w_rounded: its squared output error over the calibration inputs, [O]."""
    error_OI = weight_OI.float() - PackedLinear.from_codes(*rounded, format).dense()
    return ((error_OI @ gram_II.float()) * error_OI).sum(1)


def _better_rows(weight_OI: Tensor, gram_II: Tensor, codes_OI: Tensor, rounded: Rounded,
                 format: Format) -> Tensor:
    compensated = output_error(weight_OI, gram_II, (codes_OI, *rounded[1:]), format)
    plain = output_error(weight_OI, gram_II, rounded, format)
    return torch.where((compensated < plain)[:, None], codes_OI, rounded[0])


def check_gram(weight_OI: Tensor, gram_II: Tensor, what: str = "the matrix") -> None:
    """Raises BadData where a Gram matrix does not fit the inputs of a weight, or is not finite."""
    inputs = weight_OI.shape[1]
    if gram_II.shape != (inputs, inputs) or not bool(gram_II.isfinite().all()):
        raise BadData(f"a Gram matrix of shape {tuple(gram_II.shape)} for {what}, {inputs} inputs",
                      expected=f"finite numbers, [{inputs}, {inputs}]",
                      do="calibrate on this model, with weights and activations that are finite")
