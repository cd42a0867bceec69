"""The part of a weight that data uses: subspaces of inputs and outputs, and weights of lower rank.

W' = P_T W P_S with P_S the projection on the directions in which inputs vary and P_T that of outputs, both with the
mean's direction (arXiv 2407.04797; the energy threshold and the mean are our reading). `best` is the reference:
the weight of a given rank whose outputs are closest in mean square, from the singular vectors of W C^(1/2).

Shapes: I inputs, O outputs, S and T kept directions of each, R rank, K directions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from layerwise.transform.moments import Moments

SMALLEST = 1e-12


@dataclass(frozen=True)
class Subspaces:
    """Orthonormal columns: input directions [I, S] and output directions [O, T]."""

    inputs_IS: Tensor
    outputs_OT: Tensor

    @property
    def rank(self) -> int:
        """The largest rank a weight between them can have."""
        return min(self.inputs_IS.shape[1], self.outputs_OT.shape[1])


@dataclass(frozen=True)
class Axes:
    """Principal directions as columns with the mean to keep: `energy_K` largest first, `axes_KK`, `mean_K`."""

    energy_K: Tensor
    axes_KK: Tensor
    mean_K: Tensor

    @classmethod
    def of(cls, covariance_KK: Tensor, mean_K: Tensor) -> Axes:
        energy_K, axes_KK = torch.linalg.eigh((covariance_KK + covariance_KK.T) / 2)
        return cls(energy_K.flip(0), axes_KK.flip(1), mean_K)

    def first(self, count: int) -> Tensor:
        """An orthonormal basis of `count` axes and the part of the mean outside them, if there is one."""
        axes_KS = self.axes_KK[:, :count]
        rest_K = self.mean_K - axes_KS @ (axes_KS.T @ self.mean_K)
        if count >= len(self.mean_K) or float(rest_K.norm()) <= 1e-9 * max(1.0, float(self.mean_K.norm())):
            return axes_KS
        return torch.cat([axes_KS, (rest_K / rest_K.norm())[:, None]], 1)


class Directions:
    """Where the inputs of a weight vary and where its outputs do; decomposed once, read at any threshold."""

    def __init__(self, weight_OI: Tensor, seen: Moments) -> None:
        weight_OI, covariance_II = weight_OI.detach().double(), seen.covariance_II
        self.inputs = Axes.of(covariance_II, seen.mean_I)
        self.outputs = Axes.of(weight_OI @ covariance_II @ weight_OI.T, weight_OI @ seen.mean_I)

    def used(self, eps: float) -> Subspaces:
        """The directions that hold 1 - eps of the variance on either side, and the means' directions."""
        return Subspaces(self.inputs.first(energy_rank(self.inputs.energy_K, eps)),
                         self.outputs.first(energy_rank(self.outputs.energy_K, eps)))

    def leading(self, rank: int) -> Subspaces:
        """`rank` directions on both sides, the means' among them."""
        return Subspaces(self.inputs.first(rank - 1), self.outputs.first(rank - 1))


def energy_rank(energy_K: Tensor, eps: float) -> int:
    """How many of the largest energies make up 1 - eps of their sum."""
    part_K = energy_K.double().clamp(min=0).sort(descending=True).values.cumsum(0)
    return min(len(part_K), int((part_K < (1 - eps) * part_K[-1]).sum()) + 1)


def numerical_rank(weight_OI: Tensor, tolerance: float = 1e-3) -> int:
    """How many singular values exceed `tolerance` times the largest."""
    singular_K = torch.linalg.svdvals(weight_OI.detach().double())
    return int((singular_K > tolerance * singular_K[0]).sum())


def project(weight_OI: Tensor, spaces: Subspaces) -> Tensor:
    """P_T W P_S, in the weight's dtype."""
    wide_OR, narrow_RI = factors(weight_OI, spaces)
    return (wide_OR @ narrow_RI).to(weight_OI)


def factors(weight_OI: Tensor, spaces: Subspaces) -> tuple[Tensor, Tensor]:
    """P_T W P_S as a product [O, R] [R, I] of its rank, float64."""
    s_IS, t_OT = spaces.inputs_IS, spaces.outputs_OT
    core_TS = t_OT.T @ weight_OI.detach().double() @ s_IS
    return (t_OT @ core_TS, s_IS.T) if s_IS.shape[1] <= t_OT.shape[1] else (t_OT, core_TS @ s_IS.T)


def best(weight_OI: Tensor, seen: Moments) -> tuple[Tensor, Tensor]:
    """[O, K] and [K, I], float64; the product of the first R columns and rows has, of all weights of rank R, the
    least mean squared error of outputs on the data.
    """
    axes = Axes.of(seen.second_II, seen.mean_I)
    root_I = axes.energy_K.clamp(min=SMALLEST * float(axes.energy_K.max())).sqrt()
    u_OK, s_K, v_KI = torch.linalg.svd((weight_OI.detach().double() @ axes.axes_KK) * root_I, full_matrices=False)
    return u_OK * s_K, (v_KI / root_I) @ axes.axes_KK.T


def plain(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """[O, K] and [K, I], float64; the product of the first R is the closest weight of rank R, whatever the data."""
    u_OK, s_K, v_KI = torch.linalg.svd(weight_OI.detach().double(), full_matrices=False)
    return u_OK * s_K, v_KI


def two_factors(layer: nn.Linear, wide_OR: Tensor, narrow_RI: Tensor) -> nn.Sequential:
    """Two linear layers in the place of one, with its bias."""
    rank = len(narrow_RI)
    narrow, wide = nn.Linear(layer.in_features, rank, bias=False), nn.Linear(rank, layer.out_features)
    narrow.weight.data.copy_(narrow_RI)
    wide.weight.data.copy_(wide_OR)
    wide.bias.data.copy_(torch.zeros(layer.out_features) if layer.bias is None else layer.bias.detach())
    return nn.Sequential(narrow, wide)


def output_error(weight_OI: Tensor, changed_OI: Tensor, seen: Moments) -> float:
    """Root mean square of the change of outputs on the data, relative to that of outputs."""
    weight_OI, second_II = weight_OI.detach().double(), seen.second_II
    change_OI = weight_OI - changed_OI.double()
    ratio = ((change_OI @ second_II) * change_OI).sum() / ((weight_OI @ second_II) * weight_OI).sum()
    return float(ratio.clamp(min=0).sqrt())
