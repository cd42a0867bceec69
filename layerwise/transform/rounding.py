"""Rounding a matrix to small integers: which scales to store, and the nearest code to every weight.

A group of weights becomes codes q with w ~ (q - 2**(bits - 1)) * scale + zero (no zero where symmetric).
Scales and zeros are rounded to bfloat16, as they are stored, before codes are chosen.

Shapes: O outputs, I inputs, G groups in a row, g inputs in a group.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from layerwise.errors import BadModel
from layerwise.spec import Format

CHUNK = 1 << 20
SMALLEST_RANGE = 0.5
"""The search tries ranges from the full one down to this part of it."""

Rounded = tuple[Tensor, Tensor, Tensor | None]
"""Codes uint8 [O, I], scale bfloat16 [O, G], zero bfloat16 [O, G] or None where symmetric."""


def round_to_nearest(weight_OI: Tensor, format: Format, *, search: int = 0,
                     importance_I: Tensor | None = None, what: str = "the matrix") -> Rounded:
    """Round each weight to the nearest value its group's scale can express.

    The range of a group is that of its weights. With `search` > 0, as many narrower ranges are tried too,
    each refined by least squares, and the one with the least squared error wins, every input's error
    weighted by `importance_I` (the diagonal of the inputs' Gram matrix). A constant group gets scale 0.
    Raises BadModel, naming `what`, where weights are not finite.
    """
    check_finite(weight_OI, what)
    if importance_I is None:
        importance_I = torch.ones(weight_OI.shape[1], device=weight_OI.device)
    rows = max(1, CHUNK // weight_OI.shape[1])
    parts = [_round(part, format, search, importance_I.float()) for part in torch.split(weight_OI, rows)]
    zeros = [zero for _, _, zero in parts if zero is not None]
    codes, scale = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
    return codes, scale, torch.cat(zeros) if zeros else None


def check_finite(weight_OI: Tensor, what: str) -> None:
    """Raises BadModel where a weight is NaN or infinite."""
    bad = int(weight_OI.numel() - weight_OI.isfinite().sum())
    if bad:
        raise BadModel(f"{bad} of {weight_OI.numel()} weights of {what} are NaN or infinite",
                       expected="finite weights", do="repair or retrain the model, or download it again")


def nearest_code(weight: Tensor, scale: Tensor, zero: Tensor | None, bits: int) -> Tensor:
    """The code, as a float, of the value nearest to each weight; all arguments broadcast."""
    half: int = 2 ** (bits - 1)
    offset = weight if zero is None else weight - zero
    return (offset / torch.where(scale == 0, 1, scale)).round_().add_(half).clamp_(0, 2**bits - 1)


def code_value(code: Tensor, scale: Tensor, zero: Tensor | None, bits: int) -> Tensor:
    """What a code stands for."""
    half: int = 2 ** (bits - 1)
    value = (code - half) * scale
    return value if zero is None else value + zero


class _Grid(NamedTuple):
    """Scale and zero of each group, [O, G, 1], rounded to bfloat16 and held in float32."""

    scale: Tensor
    zero: Tensor | None

    def better(self, other: _Grid, where: Tensor) -> _Grid:
        """`other` where the mask says so."""
        zero = None if self.zero is None or other.zero is None else torch.where(where, other.zero, self.zero)
        return _Grid(torch.where(where, other.scale, self.scale), zero)


def _round(weight_OI: Tensor, format: Format, search: int, importance_I: Tensor) -> Rounded:
    bits, columns = format.bits, weight_OI.shape[1]
    w_OGg, h_Gg = _grouped(weight_OI.float(), importance_I, format)
    grid = _searched(w_OGg, h_Gg, format, search)
    codes_OGg = nearest_code(w_OGg, *grid, bits)
    zero = None if grid.zero is None else grid.zero[..., 0].bfloat16()
    return codes_OGg.flatten(1)[:, :columns].to(torch.uint8), grid.scale[..., 0].bfloat16(), zero


def _grouped(w_OI: Tensor, h_I: Tensor, format: Format) -> tuple[Tensor, Tensor]:
    """Weights [O, G, g], importances [G, g]; a last group is filled with its last weight at importance 0."""
    group = format.group or w_OI.shape[1]
    missing = -w_OI.shape[1] % group
    if missing:
        w_OI = torch.cat([w_OI, w_OI[:, -1:].expand(-1, missing)], 1)
    return w_OI.reshape(len(w_OI), -1, group), F.pad(h_I, (0, missing)).view(-1, group)


def _searched(w_OGg: Tensor, h_Gg: Tensor, format: Format, search: int) -> _Grid:
    low, high = w_OGg.amin(-1, keepdim=True), w_OGg.amax(-1, keepdim=True)
    best = _covering(low, high, format)
    least = torch.full_like(low, torch.inf)
    middle = torch.zeros_like(low) if format.symmetric else (low + high) / 2
    for step in range(search):
        part = 1 - (1 - SMALLEST_RANGE) * step / search
        grid = _covering(middle + (low - middle) * part, middle + (high - middle) * part, format)
        codes, error = _try(w_OGg, h_Gg, grid, format.bits)
        best, least = best.better(grid, error < least), torch.minimum(error, least)
        grid, error = _refined(w_OGg, h_Gg, codes, format)
        best, least = best.better(grid, error < least), torch.minimum(error, least)
    return best


def _covering(low: Tensor, high: Tensor, format: Format) -> _Grid:
    """The finest grid that reaches from `low` to `high`."""
    levels, half = 2**format.bits - 1, 2 ** (format.bits - 1)
    if format.symmetric:
        return _Grid(_stored(torch.maximum(high / (half - 1), -low / half)), None)
    scale = _stored(high / levels - low / levels)
    return _Grid(scale, _stored(low / 2 + high / 2 + scale / 2))


def _refined(w_OGg: Tensor, h_Gg: Tensor, codes_OGg: Tensor, format: Format) -> tuple[_Grid, Tensor]:
    """The least-squares grid for given codes, and its error after choosing codes anew."""
    q = codes_OGg - 2 ** (format.bits - 1)
    if format.symmetric:
        grid = _Grid(_slope(q, w_OGg, h_Gg), None)
    else:
        total = h_Gg.sum(-1, keepdim=True)
        q_mean, w_mean = (_ratio((h_Gg * part).sum(-1, keepdim=True), total) for part in (q, w_OGg))
        scale = _slope(q - q_mean, w_OGg, h_Gg)
        grid = _Grid(scale, _stored(w_mean - scale * q_mean))
    return grid, _try(w_OGg, h_Gg, grid, format.bits)[1]


def _slope(q_OGg: Tensor, w_OGg: Tensor, h_Gg: Tensor) -> Tensor:
    """The scale with the least weighted squared error of q * scale - w."""
    hq_OGg = h_Gg * q_OGg
    return _stored(_ratio((hq_OGg * w_OGg).sum(-1, keepdim=True), (hq_OGg * q_OGg).sum(-1, keepdim=True)))


def _try(w_OGg: Tensor, h_Gg: Tensor, grid: _Grid, bits: int) -> tuple[Tensor, Tensor]:
    """Codes on a grid, and each group's weighted squared error, [O, G, 1]."""
    codes_OGg = nearest_code(w_OGg, *grid, bits)
    error_OGg = code_value(codes_OGg, *grid, bits).sub_(w_OGg).square_().mul_(h_Gg)
    return codes_OGg, error_OGg.sum(-1, keepdim=True)


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    """above / below, and 0 where a group's importance is all zero."""
    return torch.where(below > 0, above / below.clamp_min(1e-38), 0)


def _stored(value: Tensor) -> Tensor:
    return value.bfloat16().float()
