"""Store matrices as integers of 2 to 8 bits: rounded to nearest, with searched scales, by GPTQ, by descent after it."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, cast, get_args

import torch
from torch import Tensor, nn

from layerwise.errors import BadData, BadOption
from layerwise.nets.decoder import MATRICES, Block
from layerwise.nets.factored import FactoredLinear, Matrix
from layerwise.nets.packed import PackedEmbedding, PackedLinear, PackedMatrix
from layerwise.nets.tiered import PackedTable, TieredEmbedding
from layerwise.spec import Format, LayerSpec, Opaque, TableFormat, Tiers
from layerwise.transform.base import Stats, Transform
from layerwise.transform.gptq import gptq
from layerwise.transform.moments import mirrored, with_outer
from layerwise.transform.rounding import Rounded, check_finite, round_to_nearest

Method = Literal["nearest", "search", "gptq", "descent"]
SWEEPS = {"gptq": 0, "descent": 2}
SEARCH_STEPS = 5
LOOKED_UP = 0.5
"""On SmolLM2 anything from 0.3 to 3 serves about as well."""


def default_format(bits: int) -> Format:
    """The format for a width: 8 bits symmetric with one scale a row, others in groups of 32 with zeros."""
    return Format(bits, 0, symmetric=True) if bits == 8 else Format(bits, 32)


@dataclass(frozen=True)
class Quantize(Transform):
    """Store the named matrices (all that the layer has, by default) in `bits` bits.

    `group` inputs share a scale (0: the whole row); `group` and `symmetric` left None take the width's default
    format; `scale_bits` below 16 stores scales as small integers times one number of the row. `nearest` keeps
    each group's full range, `search` looks for the range with the least squared error, weighted by the
    inputs' power where statistics are at hand; `gptq` searches, then compensates rounding errors on calibration
    inputs, and `descent` goes on to improve codes and scales in turn. A name that a layer lacks is passed over,
    so that one setting serves rows of different kinds. In a token table the rows of the `frequent_rows` most frequent
    tokens are stored in the format with the label `frequent`.
    """

    name: ClassVar[str] = "quantize"
    keeps_inputs: ClassVar[bool] = True
    bits: int = 8
    group: int | None = None
    symmetric: bool | None = None
    method: Method = "nearest"
    matrices: tuple[str, ...] | None = None
    scale_bits: int = 16
    frequent: str | None = None
    frequent_rows: int = 0

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            raise BadOption(f"method={self.method!r}", expected=f"one of {get_args(Method)}",
                            do="choose one of them")
        unknown = sorted(set(self.matrices or ()) - set(MATRICES))
        if unknown:
            raise BadOption(f"matrices {unknown}", expected=f"names among {list(MATRICES)}",
                            do="correct the names")
        object.__setattr__(self, "matrices", None if self.matrices is None else tuple(self.matrices))
        object.__setattr__(self, "needs", frozenset({"gram"} if self.method in SWEEPS else ()))
        object.__setattr__(self, "wants", frozenset({"gram"} if self.method == "search" else ()))
        if (self.frequent is None) != (self.frequent_rows == 0):
            raise BadOption(f"frequent={self.frequent!r} with frequent_rows={self.frequent_rows}",
                            expected="both or none of them", do="say in which format how many rows are to be stored")
        _ = self.table_format  # a format checks itself

    @property
    def format(self) -> Format:
        """How each matrix is stored."""
        default = default_format(self.bits)
        group = default.group if self.group is None else self.group
        symmetric = default.symmetric if self.symmetric is None else self.symmetric
        return Format(self.bits, group, symmetric, self.scale_bits)

    @property
    def table_format(self) -> TableFormat:
        """How a token table is stored."""
        if self.frequent is None:
            return self.format
        return Tiers(self.frequent_rows, Format.parse(self.frequent), self.format)

    def edit(self, row: LayerSpec, hidden: int) -> LayerSpec:
        """The row with the new formats. Raises BadOption for an opaque layer, or for rows of frequent tokens."""
        if self.frequent is not None:
            raise BadOption(f"frequent={self.frequent!r} for a layer", expected="a token table, whose rows are tokens",
                            do="leave it out")
        if isinstance(row.mixer, Opaque):
            raise BadOption(f"quantizing {row.mixer.path}, which layerwise did not build",
                            expected="a layer of a decoder language model", do="leave the layer out")
        packed = dict.fromkeys(self._names(row), self.format)
        return dataclasses.replace(row, formats={**row.formats, **packed})

    def apply(self, block: nn.Module, row: LayerSpec, stats: Stats | None = None) -> Block:
        """A block whose matrices are packed. One that is packed in this format already is kept; one packed
        in another is rounded again from its values.

        Raises BadData where GPTQ lacks a Gram matrix, BadModel where weights are not finite.
        """
        block = cast(Block, block)
        grams = stats or {}
        matrices = {name: block.matrix(name) for name in self._names(row)}
        done = self._together(matrices, grams) if self.method in SWEEPS else {}
        return block.with_matrices(done | {name: packed(matrix, self.format, self.method, grams.get(name),
                                                        f"matrix {name!r}")
                                           for name, matrix in matrices.items() if name not in done})

    def _together(self, matrices: Mapping[str, Matrix], grams: Stats) -> dict[str, Matrix]:
        """Matrices that read the same inputs, packed as one stacked on its outputs, which is faster."""
        sharing: dict[int, list[str]] = defaultdict(list)
        for name, matrix in matrices.items():
            if name in grams and isinstance(matrix, nn.Linear):
                check_finite(matrix.weight, f"matrix {name!r}")
                sharing[id(grams[name])].append(name)
        done: dict[str, Matrix] = {}
        for names in sharing.values():
            weights = [values(matrices[name]) for name in names]
            rounded = rounded_by(self.method, torch.cat(weights), self.format, grams[names[0]],
                                 f"matrix {' and '.join(map(repr, names))}")
            sizes = [len(weight_OI) for weight_OI in weights]
            codes, scale = rounded[0].split(sizes), rounded[1].split(sizes)
            zero = [None] * len(names) if rounded[2] is None else rounded[2].split(sizes)
            for index, name in enumerate(names):
                done[name] = PackedLinear.from_codes(codes[index], scale[index], zero[index], self.format,
                                                     bias=matrices[name].bias)
        return done

    def _names(self, row: LayerSpec) -> list[str]:
        return [name for name in row.matrices(hidden=1) if self.matrices is None or name in self.matrices]


def packed(matrix: Matrix, format: Format, method: Method = "nearest", gram_II: Tensor | None = None,
           what: str = "the matrix") -> Matrix:
    """`matrix` in `format`, itself where it is already; of two factors, the second as its inputs then are.

    Raises as `rounded_by` does.
    """
    if isinstance(matrix, FactoredLinear):
        a = packed(matrix.a, format, method, gram_II, f"the first factor of {what}")
        inner_RR = None if gram_II is None else values(a) @ gram_II.float() @ values(a).T
        b = packed(matrix.b, format, method, inner_RR, f"the second factor of {what}")
        return matrix if (a, b) == (matrix.a, matrix.b) else FactoredLinear(a, b)  # type: ignore[arg-type]
    if isinstance(matrix, PackedLinear) and matrix.format == format:
        return matrix
    rounded = rounded_by(method, values(matrix), format, gram_II, what)
    return PackedLinear.from_codes(*rounded, format, bias=matrix.bias)


def pack_table(weight_VC: Tensor, format: TableFormat, method: Method = "nearest", gram_CC: Tensor | None = None,
               order_V: Tensor | None = None) -> PackedTable:
    """A token table (embedding or head) in a packed format, for a residual stream of the weights' dtype.

    `gram_CC` is that of what a head multiplies, see `table_gram`; without it there are no inputs to calibrate on,
    and `gptq` and `descent` search. `order_V` holds the tokens, the most frequent first, which tiers need.
    Raises BadModel where weights are not finite, and BadData for tiers without an order.
    """
    if isinstance(format, Tiers):
        if order_V is None:
            raise BadData(f"a token table as {format.label} without text", expected="text that shows which tokens are "
                          "frequent", do="pass data")
        order_V = order_V.to(weight_VC.device)
        parts = order_V.split(format.parts(len(order_V)))
        frequent, rare = (_one_format(weight_VC[part], one, method, gram_CC)
                          for part, one in zip(parts, (format.frequent, format.rare), strict=True))
        return TieredEmbedding(frequent, rare, order_V.argsort())
    return _one_format(weight_VC, format, method, gram_CC)


def _one_format(weight_VC: Tensor, format: Format, method: Method, gram_CC: Tensor | None) -> PackedEmbedding:
    if method in SWEEPS and gram_CC is None:
        method = "search"
    rounded = rounded_by(method, weight_VC.detach(), format, gram_CC, what="the token table")
    return PackedEmbedding.from_codes(*rounded, format, weight_VC.dtype)


def table_gram(normed_NC: Iterable[Tensor], tied: bool) -> Tensor:
    """What an error in the head's table costs, [C, C] float32: the Gram matrix of what it multiplies.

    A tied table is looked up as well, where every entry matters alike: LOOKED_UP of the mean diagonal is added.
    """
    upper_CC: Tensor | None = None
    for x_NC in normed_NC:
        upper_CC = with_outer(upper_CC, x_NC.float())
    assert upper_CC is not None
    gram_CC = mirrored(upper_CC)
    if tied:
        gram_CC.diagonal().add_(LOOKED_UP * gram_CC.diagonal().mean())
    return gram_CC


@torch.no_grad()
def rounded_by(method: Method, weight_OI: Tensor, format: Format, gram_II: Tensor | None = None,
               what: str = "the matrix") -> Rounded:
    """Codes, scales and zeros of a matrix. A Gram matrix of its inputs weighs what `search` minimises.

    Raises BadData where `gptq` or `descent` lacks the Gram matrix, and BadModel, naming `what`, where weights are
    not finite.
    """
    if method == "nearest":
        return round_to_nearest(weight_OI, format, what=what)
    if method == "search":
        importance_I = None if gram_II is None else gram_II.diagonal()
        return round_to_nearest(weight_OI, format, search=SEARCH_STEPS, importance_I=importance_I, what=what)
    if gram_II is None:
        raise BadData(f"{method} on {what} without statistics of its inputs", expected="calibration data",
                      do="pass data, or use method='search', which needs none")
    return gptq(weight_OI, gram_II, format, search=SEARCH_STEPS, sweeps=SWEEPS[method], what=what)


def values(module: nn.Module) -> Tensor:
    """The weights of a linear layer or table, dense, packed or factored, [O, I]; a packed table's in its dtype."""
    if isinstance(module, PackedTable):
        return module.dense(module.dtype)
    if isinstance(module, FactoredLinear | PackedMatrix):
        return module.dense()
    return cast(Tensor, module.weight).detach()
