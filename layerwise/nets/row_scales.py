"""Scales of a row's groups as small integers times one number of the row, as formats with `scale_bits` store them.

A value is bfloat16(step * row): `step` takes `scale_bits` bits, `row` is bfloat16. Scales take steps from 0 to
2^bits - 1, zeros from -(2^(bits - 1) - 1) to 2^(bits - 1) - 1, stored with 2^(bits - 1) added. Up to 6 bits, steps
can be read back from the values, so a matrix keeps the values and only its stored form holds steps.

Shapes: O rows, G groups in a row.
"""

from __future__ import annotations

import torch
from torch import Tensor


def steps_of(values_OG: Tensor, bits: int, signed: bool) -> tuple[Tensor, Tensor]:
    """Steps as stored, uint8 [O, G], and the number of each row, bfloat16 [O], nearest to bfloat16 `values_OG`.

    Exact for values that `values_of` gave, if the largest step of a row is at least half of what fits. A
    scale that is not 0 does not become 0.
    """
    most = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
    values_OG = values_OG.float()
    row_O = torch.zeros(len(values_OG), dtype=torch.bfloat16, device=values_OG.device)
    least_O = torch.full_like(row_O, torch.inf, dtype=torch.float32)
    largest_O = values_OG.abs().amax(1)
    left_N = torch.arange(len(values_OG), device=values_OG.device)
    for largest_step in range(most, most // 2, -1):
        for neighbour in (0, -1, 1):
            candidate_N = _neighbour(largest_O[left_N] / largest_step, neighbour)
            there_NG = _values(_nearest(values_OG[left_N], candidate_N, most, signed), candidate_N)
            error_N = (there_NG.float() - values_OG[left_N]).square().sum(1)
            better_N = error_N < least_O[left_N]
            row_O[left_N] = torch.where(better_N, candidate_N, row_O[left_N])
            least_O[left_N] = torch.minimum(error_N, least_O[left_N])
        left_N = left_N if left_N.is_meta else left_N[least_O[left_N] > 0]
        if left_N.is_meta or not len(left_N):
            break
    steps_OG = _nearest(values_OG, row_O, most, signed)
    return (steps_OG + (2 ** (bits - 1) if signed else 0)).to(torch.uint8), row_O


def values_of(steps_OG: Tensor, row_O: Tensor, bits: int, signed: bool) -> Tensor:
    """What stored steps stand for, bfloat16 [O, G]."""
    return _values(steps_OG.float() - (2 ** (bits - 1) if signed else 0), row_O)


def nearest_value(values: Tensor, row_O: Tensor, bits: int, signed: bool) -> Tensor:
    """The values [O] or [G, O], float32, nearest to `values` among those that rows with these numbers can store."""
    most = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
    near_OG = _values(_nearest(values.view(-1, len(row_O)).T, row_O, most, signed), row_O)
    return near_OG.T.reshape(values.shape).float()


def _nearest(values_OG: Tensor, row_O: Tensor, most: int, signed: bool) -> Tensor:
    steps_OG = (values_OG / torch.where(row_O == 0, 1, row_O).float()[:, None]).round()
    return steps_OG.clamp(-most, most) if signed else torch.where(values_OG > 0, steps_OG.clamp(1, most), 0)


def _values(steps_OG: Tensor, row_O: Tensor) -> Tensor:
    return (steps_OG * row_O.float()[:, None]).bfloat16()


def _neighbour(value_O: Tensor, offset: int) -> Tensor:
    """The bfloat16 nearest to each positive value, or the one before or after it; 0 stays 0."""
    near_O = value_O.bfloat16()
    beside_O = (near_O.view(torch.int16) + offset).view(torch.bfloat16)
    return torch.where((near_O == 0) | ~beside_O.isfinite(), near_O, beside_O)
