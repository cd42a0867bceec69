"""Keep the best feed-forward channels or groups of heads of a layer, and let them make up for those that go.

With W the matrix that reads the units (`down`, `o`), G the Gram matrix of its inputs and S the inputs that go, the
least squared error of outputs that the kept inputs K can reach, and where, are

    tr(W_S Z W_S'),  Z = G_SS - G_SK G_KK^-1 G_KS,  at  W_K + W_S G_SK G_KK^-1

Of one unit alone, Z is the inverse of its block of G^-1: the score by which the worst are found, a quarter of those
left at a time, each time with the weights as they are then. Outputs count by their gains (see `gains.py`). Source:
Hassibi and Stork, Optimal Brain Surgeon, 1992; Kurtic et al., ZipLM, 2023 (arXiv 2302.04089).

Shapes: O outputs, I inputs, N units, U inputs in a unit, K kept inputs, L inputs left.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, cast, get_args

import torch
from torch import Tensor, nn

from layerwise.errors import BadData, BadOption
from layerwise.nets.decoder import Block
from layerwise.nets.dense import Dense
from layerwise.nets.factored import FactoredLinear, Matrix
from layerwise.nets.packed import PackedLinear
from layerwise.spec import Attention, FeedForward, LayerSpec, Opaque, StateSpace
from layerwise.transform.base import Stats, Transform
from layerwise.transform.gains import gained, gains
from layerwise.transform.gptq import check_gram
from layerwise.transform.quantize import packed, values
from layerwise.transform.rounding import check_finite

By = Literal["error", "norm"]
AT_ONCE = 0.25
DAMPING = 1e-3
"""Part of every input's own sum of squares that is added to it, so that singular Gram matrices can be inverted."""


@dataclass(frozen=True)
class Narrow(Transform):
    """Narrow the feed-forward half to `width` channels, attention to `kv_heads` key-value heads with their queries.

    `error` keeps what outputs on calibration inputs need and refits the next matrix; `norm` keeps the largest
    products of norms and changes no number. A half that a layer lacks is passed over.
    """

    name: ClassVar[str] = "narrow"
    width: int | None = None
    kv_heads: int | None = None
    by: By = "error"

    def __post_init__(self) -> None:
        if self.by not in get_args(By):
            raise BadOption(f"by={self.by!r}", expected=f"one of {get_args(By)}", do="choose one of them")
        if self.width is None and self.kv_heads is None:
            raise BadOption("narrowing nothing", expected="a width, a number of kv_heads, or both",
                            do="say how many feed-forward channels or key-value heads to keep")
        for field in ("width", "kv_heads"):
            count = getattr(self, field)
            if count is not None and count < 1:
                raise BadOption(f"{field}={count}", expected="1 or more",
                                do="drop the half instead: the transform 'drop'")
        object.__setattr__(self, "needs", frozenset({"gram"} if self.by == "error" else ()))

    def edit(self, row: LayerSpec, hidden: int) -> LayerSpec:
        """The narrower row. Raises BadOption for an opaque layer, routed experts, a state space, keys of another
        layer, and for more than there is.
        """
        if isinstance(row.mixer, Opaque):
            raise BadOption(f"narrowing {row.mixer.path}, which layerwise did not build",
                            expected="a layer of a decoder language model", do="leave the layer out")
        mixer, feed_forward = row.mixer, row.feed_forward
        if self.width is not None and feed_forward is not None:
            if feed_forward.experts:
                raise BadOption("narrowing routed experts", expected="one feed-forward network",
                                do="leave the layer out")
            feed_forward = replace(feed_forward, width=_fewer(self.width, feed_forward.width, "channels"))
        if self.kv_heads is not None and mixer is not None:
            if isinstance(mixer, StateSpace):
                raise BadOption("narrowing the key-value heads of a state space", expected="attention",
                                do="leave the layer out")
            if mixer.shares is not None:
                raise BadOption(f"narrowing heads that read the keys of layer {mixer.shares}",
                                expected="attention with keys and values of its own", do="leave the layer out")
            kept = _fewer(self.kv_heads, mixer.kv_heads, "key-value heads")
            mixer = replace(mixer, heads=kept * (mixer.heads // mixer.kv_heads), kv_heads=kept)
        return replace(row, mixer=mixer, feed_forward=feed_forward)

    def apply(self, block: nn.Module, row: LayerSpec, stats: Stats | None = None) -> Block:
        """A block with the kept units only; a half that is as narrow already is kept as it is.

        Raises BadData where a Gram matrix is missing or not finite, BadModel where weights are not finite.
        """
        block, new, grams = cast(Block, block), self.edit(row, hidden=1), stats or {}
        if new.feed_forward is not None and new.feed_forward != row.feed_forward:
            block = self._channels(block, row, new.feed_forward, grams)
        if isinstance(new.mixer, Attention) and new.mixer != row.mixer:
            assert isinstance(row.mixer, Attention)
            block = self._heads(block, row, row.mixer, new.mixer, grams)
        return block

    def _channels(self, block: Block, row: LayerSpec, new: FeedForward, grams: Stats) -> Block:
        names = [name for name in row.matrices(1) if name in ("gate", "up")]
        makers = [block.matrix(name) for name in names]
        kept_K = self._best(block, makers, 1, new.width, grams.get("down"), "down")
        matrices: dict[str, nn.Module] = {name: rows_of(block.matrix(name), kept_K) for name in names}
        matrices["down"] = self._reading(block.matrix("down"), kept_K, row, grams.get("down"), "down")
        return _with(block, matrices, "down", new)

    def _heads(self, block: Block, row: LayerSpec, old: Attention, new: Attention, grams: Stats) -> Block:
        group = old.heads // old.kv_heads * old.head_dim
        kept_G = self._best(block, [block.matrix("v")], group, new.kv_heads, grams.get("o"), "o")
        query_K, key_K = _inputs(kept_G, group), _inputs(kept_G, old.head_dim)
        rows = {"q": query_K, "k": key_K, "v": key_K}
        matrices: dict[str, nn.Module] = {name: rows_of(block.matrix(name), kept) for name, kept in rows.items()}
        matrices["o"] = self._reading(block.matrix("o"), query_K, row, grams.get("o"), "o")
        return _with(block, matrices, "o", new)

    def _best(self, block: Block, makers: Iterable[nn.Module], unit: int, count: int, gram_II: Tensor | None,
              name: str) -> Tensor:
        """The best units for the matrix `name`, which reads them, in order of place, [count]."""
        weight_OI = values(block.matrix(name))
        check_finite(weight_OI, f"matrix {name!r}")
        if self.by == "norm":
            size_N = _norms(weight_OI.T, len(weight_OI.T) // unit)
            for maker in makers:
                size_N = size_N * _norms(values(maker), len(size_N))
            order_N = size_N.argsort(descending=True, stable=True)
        elif gram_II is None:
            raise BadData(f"narrowing the inputs of matrix {name!r} without their statistics",
                          expected="calibration data", do="pass data, or use by='norm', which needs none")
        else:
            check_gram(gram_II, weight_OI.shape[1], f"matrix {name!r}")
            order_N = ranked(gained(weight_OI, gains(block, name)), gram_II, unit, count)
        return order_N[:count].sort().values

    def _reading(self, matrix: Matrix, kept_K: Tensor, row: LayerSpec, gram_II: Tensor | None, name: str) -> Matrix:
        """The matrix that reads the units, for the kept ones, in the format that it has."""
        format = row.formats.get(name)
        if self.by == "error" and gram_II is not None:
            mixing_IK, gram_KK = refit(gram_II, kept_K), gram_II[kept_K][:, kept_K]
        else:
            mixing_IK, gram_KK = torch.eye(matrix.in_features, device=kept_K.device)[:, kept_K], None
        narrow = _times(matrix, mixing_IK)
        return packed(narrow, format, "search", gram_KK) if format else narrow


@torch.no_grad()
def ranked(weight_OI: Tensor, gram_II: Tensor, unit: int = 1, keep: int = 1) -> Tensor:
    """Units of `unit` inputs each from the best to the first to go, [N]; what is left at `keep` is ranked once more."""
    left_N = torch.arange(weight_OI.shape[1] // unit, device=weight_OI.device)
    gone: list[Tensor] = []
    weight_OI, gram_II = weight_OI.double(), damped(gram_II.to(weight_OI.device))
    while len(left_N):
        score_N = _scores(weight_OI, gram_II, left_N, unit)
        order_N = left_N[score_N.argsort(descending=True, stable=True)]
        stay = len(left_N) - max(1, int(AT_ONCE * len(left_N)))
        stay = 0 if len(left_N) <= keep else max(stay, keep)
        gone.insert(0, order_N[stay:])
        left_N = order_N[:stay].sort().values
    return torch.cat(gone)


def refit(gram_II: Tensor, kept_K: Tensor) -> Tensor:
    """M [I, K], float64: W M is the weight on kept inputs whose outputs are closest to those of W."""
    damped_KK = damped(gram_II)[kept_K][:, kept_K]
    mixing_IK = torch.cholesky_solve(gram_II.double()[kept_K], torch.linalg.cholesky(damped_KK)).T
    mixing_IK[kept_K] = torch.eye(len(kept_K), dtype=torch.float64, device=gram_II.device)
    return mixing_IK


def damped(gram_II: Tensor) -> Tensor:
    """The Gram matrix, float64, with a part of its diagonal added; inputs never active count as independent."""
    gram_II = gram_II.double()
    diagonal_I = gram_II.diagonal()
    return gram_II + torch.diag(torch.where(diagonal_I > 0, DAMPING * diagonal_I, 1.0))


def rows_of(matrix: Matrix, kept_K: Tensor) -> Matrix:
    """The matrix for some of its outputs, with their biases, exactly as they are stored."""
    if isinstance(matrix, FactoredLinear):
        return FactoredLinear(matrix.a, cast(Any, rows_of(matrix.b, kept_K)))
    if isinstance(matrix, nn.Linear):
        return Dense.of(matrix.weight[kept_K], None if matrix.bias is None else matrix.bias[kept_K])
    narrow = PackedLinear.empty(len(kept_K), matrix.in_features, matrix.format, matrix.bias is not None)
    narrow.load_state_dict({name: tensor[kept_K] for name, tensor in matrix.state_dict().items()}, assign=True)
    return narrow.requires_grad_(False)


def _scores(weight_OI: Tensor, gram_II: Tensor, left_N: Tensor, unit: int) -> Tensor:
    """How much the error of outputs grows when one of the units left goes too, [N]."""
    left_L = _inputs(left_N, unit)
    inverse_LL = torch.cholesky_inverse(torch.linalg.cholesky(gram_II[left_L][:, left_L]))
    now_OL = weight_OI[:, left_L] if len(left_L) == len(gram_II) else weight_OI @ (gram_II[:, left_L] @ inverse_LL)
    block_NUU = inverse_LL.view(len(left_N), unit, len(left_N), unit).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    now_NUO = now_OL.T.reshape(len(left_N), unit, -1)
    error_NUO: Tensor = now_NUO * torch.linalg.solve(block_NUU, now_NUO)
    return error_NUO.sum((1, 2))


def _inputs(units_N: Tensor, unit: int) -> Tensor:
    """The inputs of units, in order."""
    return (units_N[:, None] * unit + torch.arange(unit, device=units_N.device)).flatten()


def _norms(weight_OI: Tensor, units: int) -> Tensor:
    """The norm of each unit of adjacent outputs, [units]."""
    norm_N: Tensor = torch.linalg.vector_norm(weight_OI.float().reshape(units, -1), dim=1)
    return norm_N


def _times(matrix: Matrix, mixing_IK: Tensor) -> Matrix:
    """The matrix applied after M: W M, dense; of two factors, the first changes."""
    if isinstance(matrix, FactoredLinear):
        return FactoredLinear(cast(Any, _times(matrix.a, mixing_IK)), matrix.b)
    weight_OI = values(matrix)
    return Dense.of((weight_OI.to(mixing_IK) @ mixing_IK).to(weight_OI.dtype), matrix.bias)


def _with(block: Block, matrices: Mapping[str, nn.Module], name: str, spec: FeedForward | Attention) -> Block:
    """A block with other matrices, and with their half's part of the row."""
    block = block.with_matrices(matrices)
    block.branch(name).body.spec = cast(Any, spec)
    return block


def _fewer(asked: int, there: int, what: str) -> int:
    if asked > there:
        raise BadOption(f"keeping {asked} {what} of {there}", expected=f"at most {there}", do="ask for fewer")
    return asked
