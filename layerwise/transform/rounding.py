"""Rounding a matrix to small integers: which scales to store, and the nearest code to every weight.

A group of weights becomes codes q with w ~ (q - 2**(bits - 1)) * scale + zero (no zero where symmetric).
Scales and zeros are rounded to bfloat16, or as the format stores them, before codes are chosen. Matrices are worked on
transposed, inputs by outputs, so that sums over a group add whole vectors of outputs.

Shapes: O outputs, I inputs, G groups in a row, g inputs in a group.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from layerwise.errors import BadModel
from layerwise.io.weights import is_finite
from layerwise.nets.row_scales import nearest_value, steps_of
from layerwise.spec import Format

CHUNK = 1 << 18
"""Weights rounded at a time, so that intermediates stay in cache."""

SMALLEST_RANGE = 0.5
"""The search tries ranges from the full one down to this part of it."""

REFINEMENTS = 2
"""How often the best grid found is rounded to and fitted again."""

Rounded = tuple[Tensor, Tensor, Tensor | None]
"""Codes uint8 [O, I], scale bfloat16 [O, G], zero bfloat16 [O, G] or None where symmetric."""


class Grid(NamedTuple):
    """Scale and zero of each group, rounded to bfloat16 and held in float32: [G, 1, O] or [G, O]."""

    scale: Tensor
    zero: Tensor | None

    def better(self, other: Grid, where: Tensor) -> Grid:
        """`other` where the mask says so."""
        zero = None if self.zero is None or other.zero is None else torch.where(where, other.zero, self.zero)
        return Grid(torch.where(where, other.scale, self.scale), zero)

    def line(self, bits: int) -> tuple[Tensor, Tensor, Tensor]:
        """(slope, offset, first) with code = round(w * slope + offset), and `first` the value of code 0."""
        first = -(2 ** (bits - 1)) * self.scale
        if self.zero is not None:
            first = first + self.zero
        slope = torch.where(self.scale == 0, 0, 1 / self.scale)
        return slope, torch.where(self.scale == 0, 2.0 ** (bits - 1), -first * slope), first


def round_to_nearest(weight_OI: Tensor, format: Format, *, search: int = 0,
                     importance_I: Tensor | None = None, what: str = "the matrix") -> Rounded:
    """Round each weight to the nearest value its group's scale can express.

    The range of a group is that of its weights. With `search` > 0, as many narrower ranges are tried too,
    each refined by least squares, and the one with the least squared error wins, every input's error
    weighted by `importance_I` (the diagonal of the inputs' Gram matrix). A constant group gets scale 0.
    Raises BadModel, naming `what`, where weights are not finite.
    """
    check_finite(weight_OI, what)
    parts = []
    for part_OI in torch.split(weight_OI, max(1, CHUNK // weight_OI.shape[1])):
        w_IO = part_OI.T.float().contiguous()
        grid = find_grid(w_IO, format, search, importance_I)
        parts.append(stored(nearest_codes(w_IO, grid, format), grid))
    return joined(parts)


def find_grid(w_IO: Tensor, format: Format, search: int, importance_I: Tensor | None) -> Grid:
    """Scale and zero [G, O] of float32 weights [I, O], as `round_to_nearest` chooses them."""
    importance_I = torch.ones(len(w_IO), device=w_IO.device) if importance_I is None else importance_I.float()
    parts = []
    for part_IO in w_IO.split(max(1, CHUNK // len(w_IO)), 1):
        w_GgO, h_G1g = _grouped(part_IO, importance_I, format)
        parts.append(_searched(w_GgO, h_G1g, format, search))
    scale_GO = torch.cat([part.scale for part in parts], -1)[:, 0]
    zeros = [part.zero for part in parts if part.zero is not None]
    grid = Grid(scale_GO, torch.cat(zeros, -1)[:, 0] if zeros else None)
    to_scale, to_zero = storable(grid, format)
    return Grid(to_scale(grid.scale), None if grid.zero is None else to_zero(grid.zero))


def storable(grid: Grid, format: Format) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """What rounds scales, and zeros, [..., O] to those that the format can store beside those of `grid` [G, O]."""
    if format.scale_bits == 16:
        return rounded_scale, rounded_scale
    bits, numbers = format.scale_bits, (grid.scale, grid.scale if grid.zero is None else grid.zero)
    scale_O, zero_O = (steps_of(part.T, bits, signed)[1] for part, signed in zip(numbers, (False, True), strict=True))
    return (lambda value: nearest_value(value, scale_O, bits, False),
            lambda value: nearest_value(value, zero_O, bits, True))


def nearest_codes(w_IO: Tensor, grid: Grid, format: Format) -> Tensor:
    """The codes of the values nearest to the weights, float32 [I, O]."""
    group = format.group or len(w_IO)
    slope_GO, offset_GO, _ = grid.line(format.bits)
    codes = [torch.addcmul(offset_O, part_gO, slope_O).round_().clamp_(0, 2**format.bits - 1)
             for part_gO, slope_O, offset_O in zip(w_IO.split(group), slope_GO, offset_GO, strict=True)]
    return torch.cat(codes)


def code_values(codes_IO: Tensor, grid: Grid, format: Format) -> Tensor:
    """What codes stand for, float32 [I, O]."""
    group = format.group or len(codes_IO)
    zeros = [None] * len(grid.scale) if grid.zero is None else list(grid.zero)
    return torch.cat([code_value(part_gO, scale_O, zero_O, format.bits) for part_gO, scale_O, zero_O
                      in zip(codes_IO.split(group), grid.scale, zeros, strict=True)])


def code_value(code: Tensor, scale: Tensor, zero: Tensor | None, bits: int) -> Tensor:
    """What one code stands for; all arguments broadcast."""
    half: int = 2 ** (bits - 1)
    value = (code - half) * scale
    return value if zero is None else value + zero


def stored(codes_IO: Tensor, grid: Grid) -> Rounded:
    """Codes [I, O] and their grid [G, O] as they are kept."""
    scale_OG, zero_OG = (None if part is None else part.T.contiguous().bfloat16() for part in grid)
    assert scale_OG is not None
    return codes_IO.to(torch.uint8).T.contiguous(), scale_OG, zero_OG


def joined(parts: list[Rounded]) -> Rounded:
    """The outputs of several matrices, one after the other."""
    zeros = [zero for _, _, zero in parts if zero is not None]
    codes, scale = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
    return codes, scale, torch.cat(zeros) if zeros else None


def check_finite(weight_OI: Tensor, what: str) -> None:
    """Raises BadModel where a weight is NaN or infinite."""
    if not is_finite(weight_OI):
        bad = int(weight_OI.numel() - weight_OI.isfinite().sum())
        raise BadModel(f"{bad} of {weight_OI.numel()} weights of {what} are NaN or infinite",
                       expected="finite weights", do="repair or retrain the model, or download it again")


def _grouped(w_IO: Tensor, h_I: Tensor, format: Format) -> tuple[Tensor, Tensor]:
    """Weights [G, g, O], importances [G, 1, g]; a last group is filled with its last weight at importance 0."""
    group = format.group or len(w_IO)
    missing = -len(w_IO) % group
    if missing:
        w_IO = torch.cat([w_IO, w_IO[-1:].expand(missing, -1)])
    return w_IO.reshape(-1, group, w_IO.shape[1]), F.pad(h_I, (0, missing)).view(-1, 1, group)


def _searched(w_GgO: Tensor, h_G1g: Tensor, format: Format, search: int) -> Grid:
    """The covering grid, or the best of the narrower ones after least squares, whichever has less error."""
    low, high = w_GgO.amin(1, keepdim=True), w_GgO.amax(1, keepdim=True)
    best = _covering(low, high, format)
    if not search:
        return best
    middle = torch.zeros_like(low) if format.symmetric else (low + high) / 2
    _, least = _try(w_GgO, h_G1g, best, format.bits)
    found, bound = best, torch.full_like(low, torch.inf)
    for step in range(search):
        part = 1 - (1 - SMALLEST_RANGE) * step / search
        grid = _covering(middle + (low - middle) * part, middle + (high - middle) * part, format)
        refined, error = _refined(w_GgO, h_G1g, _codes(w_GgO, grid, format.bits)[0], format)
        found, bound = found.better(refined, error < bound), torch.minimum(error, bound)
    for _ in range(REFINEMENTS):
        codes, error = _try(w_GgO, h_G1g, found, format.bits)
        best, least = best.better(found, error < least), torch.minimum(error, least)
        found, _ = _refined(w_GgO, h_G1g, codes, format)
    return best


def _covering(low: Tensor, high: Tensor, format: Format) -> Grid:
    """The finest grid that reaches from `low` to `high`."""
    levels, half = 2**format.bits - 1, 2 ** (format.bits - 1)
    if format.symmetric:
        return Grid(rounded_scale(torch.maximum(high / (half - 1), -low / half)), None)
    scale = rounded_scale(high / levels - low / levels)
    return Grid(scale, rounded_scale(low / 2 + high / 2 + scale / 2))


def _refined(w_GgO: Tensor, h_G1g: Tensor, codes_GgO: Tensor, format: Format) -> tuple[Grid, Tensor]:
    """The grid with the least weighted squared error for given codes (changed in place), and that error.

    The error lacks what does not depend on the grid, the sum of h w^2; both are [G, 1, O].
    """
    q_GgO = codes_GgO.sub_(2 ** (format.bits - 1))
    qw, q = torch.bmm(h_G1g, q_GgO * w_GgO), None if format.symmetric else torch.bmm(h_G1g, q_GgO)
    qq = torch.bmm(h_G1g, q_GgO.square_())
    if q is None:
        scale = rounded_scale(_ratio(qw, qq))
        return Grid(scale, None), scale * (scale * qq - 2 * qw)
    total, w = h_G1g.sum(-1, keepdim=True), torch.bmm(h_G1g, w_GgO)
    q_mean, w_mean = _ratio(q, total), _ratio(w, total)
    scale = rounded_scale(_ratio(qw - q_mean * w, qq - q_mean * q))
    zero = rounded_scale(w_mean - scale * q_mean)
    return Grid(scale, zero), scale * (scale * qq - 2 * qw) + zero * (zero * total + 2 * (scale * q - w))


def _codes(w_GgO: Tensor, grid: Grid, bits: int) -> tuple[Tensor, Tensor]:
    """Codes on a grid, and where between codes the weights lie."""
    slope, offset, _ = grid.line(bits)
    exact_GgO = torch.addcmul(offset, w_GgO, slope)
    return exact_GgO.round().clamp_(0, 2**bits - 1), exact_GgO


def _try(w_GgO: Tensor, h_G1g: Tensor, grid: Grid, bits: int) -> tuple[Tensor, Tensor]:
    """Codes on a grid, and each group's weighted squared error, [G, 1, O]; infinite where the scale is 0."""
    codes_GgO, exact_GgO = _codes(w_GgO, grid, bits)
    error_G1O = torch.bmm(h_G1g, exact_GgO.sub_(codes_GgO).square_()).mul_(grid.scale * grid.scale)
    return codes_GgO, error_G1O.masked_fill_(grid.scale == 0, torch.inf)


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    """above / below, and 0 where a group's importance is all zero."""
    return torch.where(below > 0, above / below.clamp_min(1e-38), 0)


def rounded_scale(value: Tensor) -> Tensor:
    """To bfloat16 precision, as scales and zeros are stored."""
    return value.bfloat16().float()
