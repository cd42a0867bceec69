"""Store a matrix as two factors: y = b (a x) with `a` [R, I] and `b` [O, R], the columns of `b` orthonormal.

`whitened` gives the outputs with the least squared error over the calibration inputs that any matrix of rank R
can give: with G = L L' their Gram matrix and W L = U S V', it is U_R S_R V_R' L^-1. That equals U_R U_R' W, the
projection on the leading eigenvectors of the outputs' second moment W G W' = U S^2 U', so G need not be
inverted and may be singular. `utilized` (arXiv 2407.04797) also confines inputs, to the R leading directions of G.
`plain` knows no inputs: the singular vectors of W. Where outputs have gains (see `gains.py`), the first two factor W
with each output times its own, and divide `b` by it. Sources: Eckart and Young, 1936; Wang et al., SVD-LLM, 2024.

Shapes: O outputs, I inputs, R rank, K the smaller of O and I.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, Literal, cast, get_args

import torch
from torch import Tensor, nn

from layerwise.errors import BadData, BadOption
from layerwise.nets.decoder import MATRICES, Block
from layerwise.nets.dense import Dense
from layerwise.nets.factored import FactoredLinear, Matrix
from layerwise.nets.packed import PackedLinear
from layerwise.spec import LayerSpec, Opaque
from layerwise.transform.base import Stats, Transform
from layerwise.transform.gains import gained, gains
from layerwise.transform.gptq import check_gram
from layerwise.transform.quantize import packed, values
from layerwise.transform.rounding import check_finite

Method = Literal["plain", "whitened", "utilized"]
STEP = 32
NOISE = 1e-6
"""Eigenvalues of a Gram matrix summed in float32 mean nothing below this part of the largest."""


@dataclass(frozen=True)
class LowRank(Transform):
    """Store the named matrices (all that the layer has, by default) as factors of `rank`.

    A whole number is the rank itself, a number below 1 the part of the matrix's parameters that the factors
    may have at most; ranks from 32 on are then multiples of 32, which fill groups and kernels. A packed matrix
    stays in its format: both factors are rounded to it. A name that a layer lacks is passed over.
    """

    name: ClassVar[str] = "low-rank"
    keeps_inputs: ClassVar[bool] = True
    rank: int | float = 0.5
    method: Method = "whitened"
    matrices: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            raise BadOption(f"method={self.method!r}", expected=f"one of {get_args(Method)}", do="choose one of them")
        if self.rank < 1 if isinstance(self.rank, int) else not 0 < self.rank < 1:
            raise BadOption(f"rank={self.rank}", expected="a whole number from 1, or a part of the parameters below 1",
                            do="use rank=0.5 for factors with half of the parameters")
        unknown = sorted(set(self.matrices or ()) - set(MATRICES))
        if unknown:
            raise BadOption(f"matrices {unknown}", expected=f"names among {list(MATRICES)}", do="correct the names")
        object.__setattr__(self, "matrices", None if self.matrices is None else tuple(self.matrices))
        object.__setattr__(self, "needs", frozenset(() if self.method == "plain" else {"gram"}))

    def edit(self, row: LayerSpec, hidden: int) -> LayerSpec:
        """The row with the new ranks. Raises BadOption for an opaque layer, for stacks of experts, and where
        factors would be no smaller than the matrix.
        """
        if isinstance(row.mixer, Opaque):
            raise BadOption(f"factors for {row.mixer.path}, which layerwise did not build",
                            expected="a layer of a decoder language model", do="leave the layer out")
        names = self._names(row)
        if row.feed_forward and row.feed_forward.experts and any(MATRICES[name] == "feed_forward" for name in names):
            raise BadOption("factors for stacked matrices of experts", expected="matrices of attention",
                            do=f"name them: matrices={tuple(n for n in names if MATRICES[n] == 'attention')}")
        shapes = row.matrices(hidden)
        ranks = {name: self._rank(*shapes[name], name) for name in names}
        return dataclasses.replace(row, ranks={**row.ranks, **ranks})

    def apply(self, block: nn.Module, row: LayerSpec, stats: Stats | None = None) -> Block:
        """A block with the matrices in factors; those that have the rank already are kept.

        Raises BadData where a Gram matrix is missing, not finite, or of a rank below the one asked for, and
        BadModel where weights are not finite.
        """
        block, grams = cast(Block, block), stats or {}
        return block.with_matrices({name: self._factored(block, row, name, grams.get(name))
                                    for name in self._names(row)})

    def _names(self, row: LayerSpec) -> list[str]:
        return [name for name in row.matrices(hidden=1) if self.matrices is None or name in self.matrices]

    def _rank(self, outputs: int, inputs: int, name: str) -> int:
        most = largest_rank(outputs, inputs)
        rank = self.rank if isinstance(self.rank, int) else share_rank(self.rank, outputs, inputs)
        if rank > most:
            raise BadOption(f"rank {rank} for the matrix {name!r}, {outputs} x {inputs}",
                            expected=f"at most {most}, so that the factors are smaller than the matrix",
                            do="ask for a lower rank, or leave the matrix out")
        return rank

    def _factored(self, block: Block, row: LayerSpec, name: str, gram_II: Tensor | None) -> FactoredLinear:
        matrix = block.matrix(name)
        rank = self._rank(matrix.out_features, matrix.in_features, name)
        if isinstance(matrix, FactoredLinear) and matrix.rank == rank:
            return matrix
        if gram_II is None and self.method != "plain":
            raise BadData(f"low rank of matrix {name!r} without statistics of its inputs", expected="calibration data",
                          do="pass data, or use method='plain', which needs none")
        gain_O = None if self.method == "plain" else gains(block, name)
        b_OR, a_RI = factors(gained(values(matrix), gain_O), rank, gram_II, self.method, f"matrix {name!r}")
        if gain_O is not None:
            b_OR = b_OR / gain_O.to(b_OR)[:, None]
        dtype = _dtype(matrix)
        factored = FactoredLinear(Dense.of(a_RI.to(dtype)), Dense.of(b_OR.to(dtype), matrix.bias))
        format = row.formats.get(name)
        return cast(FactoredLinear, packed(factored, format, "search", gram_II)) if format else factored


def largest_rank(outputs: int, inputs: int) -> int:
    """The highest rank whose factors have fewer parameters than the matrix; 0 where there is none."""
    return (outputs * inputs - 1) // (outputs + inputs)


def share_rank(share: float, outputs: int, inputs: int) -> int:
    """The rank whose factors have at most `share` of the matrix's parameters, at least 1."""
    rank = max(1, int(share * outputs * inputs / (outputs + inputs)))
    return rank if rank < STEP else rank - rank % STEP


@torch.no_grad()
def factors(weight_OI: Tensor, rank: int, gram_II: Tensor | None = None, method: Method = "whitened",
            what: str = "the matrix") -> tuple[Tensor, Tensor]:
    """(b [O, R], a [R, I]), float64; `plain` ignores the Gram matrix, the others need it.

    Where no input was ever active, nothing says which directions matter, and they are those of `plain`.
    Raises BadData where the Gram matrix does not fit or shows fewer directions than `rank`, BadModel, naming
    `what`, where weights are not finite.
    """
    check_finite(weight_OI, what)
    weight_OI = weight_OI.double()
    if method != "plain" and gram_II is not None:
        check_gram(gram_II, weight_OI.shape[1], what)
    if method == "plain" or gram_II is None or not bool(gram_II.any()):
        b_OR = axes(weight_OI, None)[1][:, :rank]
        return b_OR, b_OR.T @ weight_OI
    gram_II = gram_II.to(weight_OI)
    energy_K, axes_OK = axes(weight_OI, gram_II)
    if float(energy_K[rank - 1]) <= NOISE * len(gram_II) * float(energy_K[0]):
        _check_directions(gram_II, rank, what)
    b_OR = axes_OK[:, :rank]
    a_RI = b_OR.T @ weight_OI
    if method == "utilized":
        inputs_IR = torch.linalg.eigh(gram_II)[1][:, -rank:]
        a_RI = (a_RI @ inputs_IR) @ inputs_IR.T
    return b_OR, a_RI


def core(weight_OI: Tensor, gram_II: Tensor | None) -> tuple[Tensor | None, Tensor]:
    """(Q [O, K] or None for the identity, M [K, K]) with W G W' = Q M Q' and Q' Q = 1; no G is the identity."""
    basis_OK, core_KI = None, weight_OI
    if weight_OI.shape[0] > weight_OI.shape[1]:
        basis_OK, core_KI = torch.linalg.qr(weight_OI)
    return basis_OK, core_KI @ core_KI.T if gram_II is None else core_KI @ gram_II @ core_KI.T


def gram_rank(gram_II: Tensor) -> int:
    """How many directions the inputs of a Gram matrix span, whatever their scales, as far as float32 sums tell."""
    scale_I = gram_II.diagonal().double().clamp(min=0).sqrt()
    live_I = scale_I > 0
    if not bool(live_I.any()):
        return 0
    scaled_LL = gram_II.double()[live_I][:, live_I] / torch.outer(scale_I[live_I], scale_I[live_I])
    energy_L = torch.linalg.eigvalsh(scaled_LL)
    return int((energy_L > NOISE * energy_L[-1]).sum())


def axes(weight_OI: Tensor, gram_II: Tensor | None) -> tuple[Tensor, Tensor]:
    """Eigenvalues [K] of W G W', largest first, and their eigenvectors as columns [O, K]."""
    basis_OK, core_KK = core(weight_OI, gram_II)
    energy_K, axes_KK = torch.linalg.eigh((core_KK + core_KK.T) / 2)
    axes_KK = axes_KK.flip(1)
    return energy_K.flip(0).clamp(min=0), axes_KK if basis_OK is None else basis_OK @ axes_KK


def _check_directions(gram_II: Tensor, rank: int, what: str) -> None:
    seen = gram_rank(gram_II)
    if seen < rank:
        raise BadData(f"calibration inputs of {what} that span {seen} directions, for rank {rank}",
                      expected=f"at least {rank}", do=f"calibrate on more text, ask for rank {max(seen, 1)} or less, "
                      "or use method='plain'")


def _dtype(matrix: Matrix) -> torch.dtype:
    """The dtype in which dense factors of a matrix are kept."""
    if isinstance(matrix, FactoredLinear):
        matrix = matrix.a
    return torch.float32 if isinstance(matrix, PackedLinear) else matrix.weight.dtype
