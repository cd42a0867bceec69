"""Learn the rotations of values for which rounding v and o afterwards is expected to lose least.

With R_k folded into the rows of v and the columns of o that belong to value head k (see `rotate`), GPTQ is expected to
leave, in a matrix with Gram matrix G of its inputs,

    error = sum over outputs and groups of range^2 / (12 (2^bits - 1)^2) * sum of p over the group

where `range` is that of the weights of a group and p_i the part of input i that inputs rounded after it cannot make up
for: G damped = M diag(p) M', M unit triangular. R changes the ranges of v and o and the p of o; bits do not matter.
From a random rotation R steps along the Cayley transform of minus the gradient, R <- (1 - X/2)^-1 (1 + X/2) R with X
antisymmetric, which keeps it orthogonal; the best R on the way is taken. v and o count by the shares of their outputs.
Sources: Liu et al., SpinQuant, 2024 (arXiv 2405.16406), which learns through rounding itself and on the loss; the
error of GPTQ as in `gptq`.

Shapes: O outputs of o, C inputs of v, K value heads, Q query heads of each, D head width, H = KQ, G groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layerwise.errors import BadData, BadOption
from layerwise.nets.decoder import Block
from layerwise.spec import Attention, LayerSpec
from layerwise.transform.base import Stats, Transform
from layerwise.transform.gptq import DAMPING, check_gram
from layerwise.transform.rotate import RotateValues, fold_rotation, rotation
from layerwise.transform.rounding import check_finite

ANGLE, MOMENTUM = 0.2, 0.5
"""How far the first step turns (root mean square over axes, in radians; later ones less), and what is left of a step in
the next. In two layers of SmolLM2 twice the angle ends within 4 % of the same error."""

ROWS = 192
"""So many outputs of o, evenly spaced, stand for all of them."""


@dataclass(frozen=True)
class LearnRotation(Transform):
    """Rotate values within each head so that v and o lose less when they are rounded in groups of `group` inputs.

    The row does not change, nor what the block computes. Learning begins at the rotations of `rotate-values` with the
    same seed and takes `steps` steps. Not for a layer whose values another layer shares.
    """

    name: ClassVar[str] = "learn-rotation"
    needs: ClassVar[frozenset[str]] = frozenset({"gram"})
    group: int = 64
    steps: int = 40
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 0 or self.group < 0:
            raise BadOption(f"steps={self.steps}, group={self.group}", expected="numbers from 0",
                            do="use steps=40 and the group size of the format (0: a whole row)")

    def turns_values(self) -> bool:
        return True

    def edit(self, row: LayerSpec, hidden: int) -> LayerSpec:
        """The row itself. Raises BadOption where there are no values of its own, or matrices that are not dense."""
        return RotateValues(self.seed).edit(row, hidden)

    @torch.no_grad()
    def apply(self, block: nn.Module, row: LayerSpec, stats: Stats | None = None) -> Block:
        """A block with rotated v and o.

        Raises BadOption as `edit` does, BadData where Gram matrices are missing or not finite, and BadModel where
        weights are not finite.
        """
        mixer = cast(Attention, self.edit(row, hidden=1).mixer)
        return fold_rotation(cast(Block, block), mixer, self.learned(cast(Block, block), mixer, stats or {}))

    def learned(self, block: Block, mixer: Attention, grams: Stats) -> Tensor:
        """The rotation of each value head, float64 [K, D, D]. Raises BadData and BadModel as `apply` does."""
        if not {"v", "o"} <= grams.keys():
            raise BadData("learning rotations without statistics of the inputs of v and o",
                          expected="calibration data", do="pass data, or use 'rotate-values', which needs none")
        v, o = (cast(nn.Linear, block.matrix(name)).weight.detach() for name in ("v", "o"))
        return learned_rotation(v, o, grams["v"], grams["o"], mixer, self.group, self.steps, self.seed)


def rotatable(rows: Sequence[LayerSpec], layer: int) -> bool:
    """Whether values of `layer` may be rotated: it has its own, v and o are dense, and no layer shares them."""
    try:
        RotateValues().edit(rows[layer], hidden=1)
    except BadOption:
        return False
    return all(getattr(row.mixer, "shares", None) != layer for row in rows)


@torch.inference_mode(False)
def learned_rotation(v_OC: Tensor, o_OI: Tensor, gram_CC: Tensor, gram_II: Tensor, mixer: Attention, group: int = 64,
                     steps: int = 40, seed: int = 0) -> Tensor:
    """Rotations [K, D, D], float64, with at most the expected error of the random ones that they start from."""
    for name, weight_OI, gram in (("v", v_OC, gram_CC), ("o", o_OI, gram_II)):
        check_finite(weight_OI, f"matrix {name!r}")
        check_gram(gram, weight_OI.shape[1], f"matrix {name!r}")
    generator = torch.Generator().manual_seed(seed)
    turn_KDD = torch.stack([rotation(mixer.head_dim, generator) for _ in range(mixer.kv_heads)])
    turn_KDD = turn_KDD.to(o_OI.device, torch.float32)
    expected = ExpectedError(v_OC.clone(), o_OI.clone(), gram_CC.clone(), gram_II.clone(), mixer, group)
    best_KDD, least, push_KDD = turn_KDD, torch.inf, torch.zeros_like(turn_KDD)
    eye_DD = torch.eye(mixer.head_dim, device=turn_KDD.device)
    for step in range(steps + 1):
        with torch.enable_grad():
            error = expected(turn_KDD.requires_grad_())
            (slope_KDD,) = torch.autograd.grad(error, turn_KDD)
        turn_KDD, error = turn_KDD.detach(), error.detach()
        if float(error) < least:
            best_KDD, least = turn_KDD, float(error)
        slope_KDD = slope_KDD @ turn_KDD.mT
        push_KDD = MOMENTUM * push_KDD + (1 - MOMENTUM) * (slope_KDD - slope_KDD.mT)
        size_K11 = push_KDD.square().mean((1, 2), keepdim=True).mul(mixer.head_dim).sqrt().clamp_min(1e-30)
        half_KDD = push_KDD * (-ANGLE / 2 * (1 - step / (steps + 1)) / size_K11)
        turn_KDD = torch.linalg.solve(eye_DD - half_KDD, (eye_DD + half_KDD) @ turn_KDD)
    left_KDD, _, right_KDD = torch.linalg.svd(best_KDD.double())
    return cast(Tensor, left_KDD @ right_KDD)


class ExpectedError:
    """The expected error of v and of o in shares of their outputs, added, times 12 (2^bits - 1)^2; differentiable."""

    def __init__(self, v_OC: Tensor, o_OI: Tensor, gram_CC: Tensor, gram_II: Tensor, mixer: Attention,
                 group: int) -> None:
        heads, self.width, self.group = mixer.heads, mixer.head_dim, group
        self.v_KDC = v_OC.float().view(mixer.kv_heads, self.width, -1)
        sample_OI = o_OI[:: max(1, len(o_OI) // ROWS)].float()
        self.o_OKQD = sample_OI.view(len(sample_OI), mixer.kv_heads, -1, self.width)
        gram_CC, gram_II = gram_CC.float(), gram_II.float()
        self.v_whole, self.o_whole = _energy(v_OC.float(), gram_CC), _energy(sample_OI, gram_II)
        self.left_C = _left(gram_CC)
        blocks = gram_II.view(heads, self.width, heads, self.width).diagonal(dim1=0, dim2=2)
        self.gram_KQDD = blocks.permute(2, 0, 1).reshape(mixer.kv_heads, -1, self.width, self.width)

    def __call__(self, turn_KDD: Tensor) -> Tensor:
        """A number for rotations [K, D, D]. Heads are taken as independent in the inputs of o."""
        turn_K1DD = turn_KDD[:, None]
        o_OI = torch.einsum("okqd,ked->okqe", self.o_OKQD, turn_KDD).flatten(1)
        left_I = _left(turn_K1DD @ self.gram_KQDD @ turn_K1DD.mT).flatten()
        v_OC = (turn_KDD @ self.v_KDC).flatten(0, 1)
        o_error = _ranges(o_OI, left_I, self.group) / self.o_whole
        return o_error + _ranges(v_OC, self.left_C, self.group) / self.v_whole


def _ranges(weight_OI: Tensor, left_I: Tensor, group: int) -> Tensor:
    """Sum over outputs and groups of the squared range of weights times the sum of `left_I` over the group."""
    group = group or len(left_I)
    missing = -len(left_I) % group
    if missing:
        weight_OI = torch.cat([weight_OI, weight_OI[:, -1:].expand(-1, missing)], 1)
    grouped_OGg = weight_OI.view(len(weight_OI), -1, group)
    range_OG = grouped_OGg.amax(2) - grouped_OGg.amin(2)
    return (range_OG.square() @ F.pad(left_I, (0, missing)).view(-1, group).sum(1)).sum()


def _left(gram_II: Tensor) -> Tensor:
    """What GPTQ, which takes inputs in order of decreasing power, leaves of an error in each, [..., I]."""
    power_I = gram_II.diagonal(dim1=-2, dim2=-1)
    least = power_I.detach().mean().clamp_min(1e-30) * 1e-6
    damped_II = gram_II + torch.diag_embed(DAMPING * power_I + least)
    order_I = power_I.detach().argsort(dim=-1)
    shape = gram_II.shape
    damped_II = damped_II.gather(-1, order_I[..., None, :].expand(shape)).gather(-2, order_I[..., None].expand(shape))
    left_I = torch.linalg.cholesky(damped_II).diagonal(dim1=-2, dim2=-1).square()
    return torch.zeros_like(left_I).scatter(-1, order_I, left_I)


def _energy(weight_OI: Tensor, gram_II: Tensor) -> float:
    return float(((weight_OI @ gram_II) * weight_OI).sum().clamp_min(1e-30))
