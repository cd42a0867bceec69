"""Scale what matrices read so that they round better, and fold the inverse into what wrote it.

W x = (W S) (S^-1 x) for a diagonal S. Inputs that are large get larger weights, hence smaller relative rounding errors,
at the cost of the others of their group. S^-1 goes into the norm before q, k, v and before gate and up, into
the rows of `up` for `down` and into the rows of `v` for `o` (one scale for the query heads that share a value
head). The block computes the same function as before, and its row says the same; only then rounding it loses less.

s = (root mean square of the input)^alpha, with the alpha that gives the least output error tr(E G E') after
rounding all matrices that read the input. Scales are powers of two, so that folding rounds nothing (but in a
norm whose weight is stored with an offset; the matrices then take up exactly what the norm gave).
Source: Lin et al., AWQ, 2023 (arXiv 2306.00978), which takes mean |x| and real scales.

Shapes: O outputs, I inputs, K value heads, D head width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, cast, get_args

import torch
from torch import Tensor, nn

from layerwise.errors import BadData, BadOption
from layerwise.nets.decoder import Block, shallow
from layerwise.nets.dense import Dense
from layerwise.nets.feed_forward import FeedForward
from layerwise.nets.norms import RMSNorm
from layerwise.nets.packed import PackedLinear
from layerwise.spec import Attention, Format, LayerSpec, Opaque
from layerwise.transform.base import Stats, Transform
from layerwise.transform.gptq import check_gram, output_error
from layerwise.transform.quantize import Method, default_format, rounded_by

Read = Literal["qkv", "o", "gate_up", "down"]
READERS: dict[Read, tuple[str, ...]] = {
    "o": ("o",), "qkv": ("q", "k", "v"), "down": ("down",), "gate_up": ("gate", "up"),
}
WRITERS: dict[Read, tuple[str, ...]] = {"o": ("v",), "down": ("up",)}
ALPHAS = tuple(step / 10 for step in range(11))


@dataclass(frozen=True)
class ScaleInputs(Transform):
    """Prepare the dense matrices of a layer for rounding to `bits` bits in groups of `group`.

    `group` and `symmetric` left None take the width's default format, `scale_bits` is as for `quantize`; `method` is
    how rounding is tried ("nearest" or "search", which are quick). `inputs` names what is scaled: what q, k and v
    read, what `o` reads, what gate and up read, what `down` reads. Leave "o" out where another layer shares this
    one's values. An input is passed over where nothing can take the inverse: `down` of a network without gate,
    routed experts.
    """

    name: ClassVar[str] = "scale-inputs"
    needs: ClassVar[frozenset[str]] = frozenset({"gram"})
    bits: int = 4
    group: int | None = None
    symmetric: bool | None = None
    method: Method = "search"
    inputs: tuple[Read, ...] = ("qkv", "o", "gate_up", "down")
    scale_bits: int = 16

    def __post_init__(self) -> None:
        object.__setattr__(self, "inputs", tuple(self.inputs))
        if self.method not in get_args(Method):
            raise BadOption(f"method={self.method!r}", expected=f"one of {get_args(Method)}", do="choose one of them")
        unknown = sorted(set(self.inputs) - set(READERS))
        if unknown:
            raise BadOption(f"inputs {unknown}", expected=f"names among {list(READERS)}", do="correct the names")
        _ = self.format

    @property
    def format(self) -> Format:
        """The rounding that is prepared for."""
        default = default_format(self.bits)
        group = default.group if self.group is None else self.group
        symmetric = default.symmetric if self.symmetric is None else self.symmetric
        return Format(self.bits, group, symmetric, self.scale_bits)

    def turns_values(self) -> bool:
        return "o" in self.inputs

    def edit(self, row: LayerSpec, hidden: int) -> LayerSpec:
        """The row itself. Raises BadOption for an opaque layer, and for matrices that are packed or factored."""
        if isinstance(row.mixer, Opaque):
            raise BadOption(f"scaling the inputs of {row.mixer.path}, which layerwise did not build",
                            expected="a layer of a decoder language model", do="leave the layer out")
        changed = {name for read in self.inputs for name in (*READERS[read], *WRITERS.get(read, ()))}
        stored = sorted({*row.formats, *row.ranks} & changed)
        if stored:
            raise BadOption(f"scaling the inputs of a layer whose matrices {stored} are packed or factored",
                            expected="dense matrices", do="put this edit before those of that layer")
        return row

    @torch.no_grad()
    def apply(self, block: nn.Module, row: LayerSpec, stats: Stats | None = None) -> Block:
        """A block with scaled weights.

        Raises BadData where a Gram matrix is missing or not finite, and BadOption as `edit` does.
        """
        self.edit(row, hidden=1)
        block, grams = cast(Block, block), stats or {}
        for read, names in READERS.items():
            present = [name for name in names if name in block.matrices()]
            writer = _writer(block, row, read) if read in self.inputs and present else None
            if writer is None:
                continue
            weights = {name: _weight(block.matrix(name)) for name in present}
            gram_II = _gram(grams, present[0], weights[present[0]].shape[1])
            block = writer(block, self._best(weights, gram_II, _shared(row, read)), present)
        return block

    def _best(self, weights: Mapping[str, Tensor], gram_II: Tensor, tie: Callable[[Tensor], Tensor]) -> Tensor:
        """The scale of each input, [I], float32: the best of those that `ALPHAS` give."""
        power_I = tie(gram_II.diagonal().float().clamp_min(0)).sqrt()
        live_I = power_I > 0
        if not bool(live_I.any()):
            return torch.ones_like(power_I)
        relative_I = torch.where(live_I, power_I / power_I[live_I].log().mean().exp(), 1.0)
        weight_OI = torch.cat([weight.float() for weight in weights.values()])
        return min((_power_of_two(relative_I**alpha) for alpha in ALPHAS),
                   key=lambda scale_I: self._error(weight_OI, gram_II, scale_I))

    def _error(self, weight_OI: Tensor, gram_II: Tensor, scale_I: Tensor) -> float:
        scaled_OI, scaled_II = weight_OI * scale_I, gram_II / scale_I[:, None] / scale_I
        rounded = rounded_by(self.method, scaled_OI, self.format, scaled_II)
        return float(output_error(scaled_OI, scaled_II, rounded, self.format).sum())


Writer = Callable[[Block, Tensor, Sequence[str]], Block]


def _writer(block: Block, row: LayerSpec, read: Read) -> Writer | None:
    """What folds scales into the matrices that read and the inverse into what writes; None where nothing can."""
    if read in ("qkv", "gate_up"):
        return _into_norm if read == "qkv" or isinstance(block.branch("up").body, FeedForward) else None
    if read == "o":
        mixer = row.mixer
        assert isinstance(mixer, Attention)
        return None if mixer.shares is not None else lambda b, scale_I, _: _into_rows(b, "v", "o", scale_I, mixer)
    gated = row.feed_forward is not None and row.feed_forward.gated and not row.feed_forward.experts
    return (lambda b, scale_I, _: _into_rows(b, "up", "down", scale_I, None)) if gated else None


def _shared(row: LayerSpec, read: Read) -> Callable[[Tensor], Tensor]:
    """Makes the power of inputs that must share a scale the same: those of query heads that share a value head."""
    mixer = row.mixer
    if read != "o" or not isinstance(mixer, Attention):
        return lambda power_I: power_I
    shape = (mixer.kv_heads, mixer.heads // mixer.kv_heads, mixer.head_dim)
    return lambda power_I: power_I.view(shape).mean(1, keepdim=True).expand(shape).reshape(-1)


def _into_norm(block: Block, scale_I: Tensor, names: Sequence[str]) -> Block:
    """Columns of `names` times the scale; the weight (and bias) of the norm that they read divided by it."""
    norm = cast(nn.LayerNorm | RMSNorm, block.branch(names[0]).norm)
    offset = norm.offset if isinstance(norm, RMSNorm) else 0.0
    before_I = norm.weight.detach().double() + offset
    stored_I = (before_I / scale_I - offset).to(norm.weight.dtype)
    after_I = stored_I.double() + offset
    given_I = torch.where(after_I != 0, before_I / after_I, 1.0)
    new = block.with_matrices({name: _linear(block.matrix(name), given_I) for name in names})
    folded = shallow(norm)
    folded.weight = nn.Parameter(stored_I, requires_grad=False)
    if isinstance(norm, nn.LayerNorm) and isinstance(folded, nn.LayerNorm):
        folded.bias = nn.Parameter((norm.bias.detach() / given_I).to(norm.bias.dtype), requires_grad=False)
    new.branch(names[0]).norm = folded
    return new


def _into_rows(block: Block, writes: str, reads: str, scale_I: Tensor, heads: Attention | None) -> Block:
    """Columns of `reads` times the scale, rows (and bias) of `writes` divided by it; value heads have one each."""
    scale_O = scale_I
    if heads is not None:
        groups = heads.heads // heads.kv_heads
        scale_O = scale_I.view(heads.kv_heads, groups, heads.head_dim)[:, 0].flatten()
    return block.with_matrices({reads: _linear(block.matrix(reads), scale_I),
                                writes: _linear(block.matrix(writes), rows_O=1 / scale_O)})


def _linear(matrix: nn.Module, columns_I: Tensor | None = None, rows_O: Tensor | None = None) -> nn.Linear:
    """A linear layer with its columns, or its rows and bias, multiplied."""
    weight_OI, bias_O = _weight(matrix), cast(Tensor | None, matrix.bias)
    work_OI = weight_OI.to(torch.promote_types(weight_OI.dtype, torch.float32))
    if columns_I is not None:
        work_OI = work_OI * columns_I.to(work_OI)
    if rows_O is not None:
        work_OI = work_OI * rows_O.to(work_OI)[:, None]
        bias_O = None if bias_O is None else bias_O * rows_O.to(bias_O)
    return Dense.of(work_OI.to(weight_OI.dtype), bias_O)


def _weight(matrix: nn.Module) -> Tensor:
    assert isinstance(matrix, nn.Linear) and not isinstance(matrix, PackedLinear), "edit refuses other matrices"
    return matrix.weight.detach()


def _gram(grams: Stats, name: str, inputs: int) -> Tensor:
    if name not in grams:
        raise BadData(f"scaling the inputs of matrix {name!r} without their statistics", expected="calibration data",
                      do="pass data")
    check_gram(grams[name], inputs, f"matrix {name!r}")
    return grams[name].float()


def _power_of_two(scale_I: Tensor) -> Tensor:
    return scale_I.log2().round().exp2()

