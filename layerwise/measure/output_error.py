"""How far a matrix's outputs move when it is stored in another format, before anything is built.

    error = tr(E G E') / tr(W G W'),   E = W - W_stored,   G = sum of x x' over the inputs x it sees

Two matrices that lose the same share of their output need not matter the same; what that share costs the
predictions is what `response` measures. Errors of GPTQ are taken from plain rounding with searched scales
and one GPTQ run of the matrix: how much it gains changes little from format to format.
Source of the error measure: Hassibi and Stork, Optimal Brain Surgeon, 1992; Frantar et al., GPTQ, 2022.

Shapes: O outputs (a sample of them), I inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from layerwise.errors import BadOption
from layerwise.measure.base import Reading
from layerwise.measure.scores import Direction
from layerwise.nets.decoder import MATRICES, Block
from layerwise.spec import Attention, Format, LayerSpec
from layerwise.stack.base import Stack, State
from layerwise.stack.decoder import DecoderStack
from layerwise.transform.gptq import output_error
from layerwise.transform.gram import grams, normed
from layerwise.transform.learn_rotation import LearnRotation, rotatable
from layerwise.transform.output_error import energy, low_rank_errors, narrow_errors
from layerwise.transform.quantize import SEARCH_STEPS, SWEEPS, Method, rounded_by, table_gram, values
from layerwise.transform.rotate import fold_rotation, rotated_gram
from layerwise.transform.rounding import round_to_nearest

PROBE = Format(3, 64)
"""Rounding to nearest in this format is the disturbance whose effect on the predictions `response` measures:
large enough to stand out of bfloat16 rounding, small enough that errors act in proportion."""

FORMATS = ("8/row=", "6/64", "4/32", "4/64", "3/64", "2/64")
STEP = 64
SEARCH: Method = "search"
ROTATED = "rotated"
ROWS, TABLE_ROWS = 96, 512
"""Channels are kept in multiples of STEP; so many outputs of a matrix, evenly spaced, stand for all of them."""


@dataclass(frozen=True)
class OutputError(Reading):
    """Columns `<matrix>:<format>`, and `<matrix>:probe` for the disturbance that `response` tries.

    `formats` are labels such as "4/128" (see `Format.label`), `method` how they are rounded. With `ranks`, columns
    `<matrix>:rank <share>` hold the error of factors with that share of the matrix's parameters; with `widths`,
    `o:width <share>` and `down:width <share>` that of keeping this share of key-value heads or of channels. Columns
    `table:<format>` say for token tables what part of the error of rounding with searched scales is left.
    With `rotated`, columns `v:rotated <format>` and `o:rotated <format>` hold the error after learned rotations.
    """

    formats: tuple[str, ...] = FORMATS
    method: Method = "gptq"
    ranks: tuple[float, ...] = ()
    widths: tuple[float, ...] = ()
    rotated: bool = False

    name: ClassVar[str] = "output-error"
    unit: ClassVar[str] = "share"
    important: ClassVar[Direction | None] = "high"
    about: ClassVar[str] = "share of a matrix's output that storing it so changes"
    for_plans: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for field in ("formats", "ranks", "widths"):
            object.__setattr__(self, field, tuple(getattr(self, field)))
        if not all(0 < share < 1 for share in (*self.ranks, *self.widths)):
            raise BadOption(f"ranks={self.ranks}, widths={self.widths} for {self.name}", expected="shares below 1",
                            do="give what is to be kept, such as 0.5")
        for label in self.formats:
            Format.parse(label)
        if not self.formats:
            raise BadOption(f"no formats for {self.name}", expected="labels such as 4/128", do="name some")

    @property
    def parts(self) -> Mapping[str, str]:
        ranks, widths = ([f"{what} {share:g}" for share in shares]
                         for what, shares in (("rank", self.ranks), ("width", self.widths)))
        found = [f"{matrix}:{label}" for matrix in MATRICES for label in (*self.formats, *ranks, "probe")]
        found += [f"{matrix}:{label}" for matrix in ("o", "down") for label in widths]
        found += [f"table:{label}" for label in self.formats]
        found += [f"{matrix}:{ROTATED} {label}" for matrix in ("v", "o") for label in self.formats if self.rotated]
        return dict.fromkeys(found, self.unit)

    def of_layer(self, stack: Stack, layer: int, states: Sequence[State]) -> Mapping[str, float]:
        block = stack.block(layer)
        if not isinstance(block, Block):
            raise BadOption(f"{self.name} of {stack.name}", expected="a decoder language model",
                            do="measure what needs only 'input' and 'output'")
        found: dict[str, float] = {}
        gram_of = grams(block, layer, states)
        for name, matrix in block.matrices().items():
            if name in gram_of:
                errors = self.of_matrix(values(matrix), gram_of[name], f"matrix {name!r} of layer {layer}")
                found |= {f"{name}:{part}": error for part, error in errors.items()}
                found |= self._structural(values(matrix), gram_of[name], name, stack.spec.rows[layer])
        if self.rotated and rotatable(stack.spec.rows, layer):
            found |= self._after_rotation(block, stack.spec.rows[layer], gram_of)
        return found

    def _after_rotation(self, block: Block, row: LayerSpec, gram_of: Mapping[str, Tensor]) -> dict[str, float]:
        """Relative errors of v and o by format once their rotation is learned; their outputs only turn with it."""
        mixer = row.mixer
        assert isinstance(mixer, Attention)
        turn_KDD = LearnRotation().learned(block, mixer, gram_of)
        turned = fold_rotation(block, mixer, turn_KDD)
        inputs = {"v": gram_of["v"], "o": rotated_gram(gram_of["o"], mixer, turn_KDD)}
        return {f"{name}:{ROTATED} {part}": error for name, gram_II in inputs.items()
                for part, error in self.of_matrix(values(turned.matrix(name)), gram_II).items() if part != "probe"}

    def _structural(self, weight_OI: Tensor, gram_II: Tensor, name: str, row: LayerSpec) -> dict[str, float]:
        """Relative errors of ranks and widths."""
        found, whole = {}, energy(weight_OI, gram_II) or 1.0
        if self.ranks:
            outputs, inputs = weight_OI.shape
            errors_R = low_rank_errors(weight_OI, gram_II)
            for share in self.ranks:
                rank = int(share * outputs * inputs / (outputs + inputs))
                found[f"{name}:rank {share:g}"] = float(errors_R[min(rank, len(errors_R) - 1)]) / whole
        units = units_of(row).get(name)
        if self.widths and units:
            errors_N, _ = narrow_errors(weight_OI, gram_II, weight_OI.shape[1] // units)
            for share in self.widths:
                found[f"{name}:width {share:g}"] = float(errors_N[kept_units(share, units, name)]) / whole
        return found

    def of_tables(self, stack: Stack, states: Sequence[State]) -> Mapping[str, Mapping[str, float]]:
        if not isinstance(stack, DecoderStack) or self.method not in SWEEPS:
            return {}
        gram_CC = table_gram(normed(stack, states), stack.spec.tied)
        place, table = ("embedding", stack.decoder.embedding) if stack.spec.tied else ("head", stack.decoder.head)
        assert table is not None
        weight_VC = sampled(values(table), TABLE_ROWS)
        found = {}
        for label, format in self._formats():
            plain, better = (_total(weight_VC, gram_CC, rounded_by(method, weight_VC, format, gram), format)
                             for method, gram in ((SEARCH, None), (self.method, gram_CC)))
            found[f"table:{label}"] = better / plain
        return {place: found}

    def of_matrix(self, weight_OI: Tensor, gram_II: Tensor, what: str = "the matrix") -> dict[str, float]:
        """Relative squared output error by format label, and of the probe."""
        weight_OI = sampled(weight_OI, ROWS)
        whole = float(((weight_OI @ gram_II) * weight_OI).sum()) or 1.0
        importance_I = gram_II.diagonal()

        def searched(format: Format) -> float:
            rounded = round_to_nearest(weight_OI, format, search=SEARCH_STEPS, importance_I=importance_I, what=what)
            return _total(weight_OI, gram_II, rounded, format)

        probe = _total(weight_OI, gram_II, round_to_nearest(weight_OI, PROBE, what=what), PROBE)
        gain = 1.0
        if self.method in SWEEPS:
            compensated = rounded_by(self.method, weight_OI, PROBE, gram_II, what)
            gain = _total(weight_OI, gram_II, compensated, PROBE) / max(searched(PROBE), 1e-30)
        if self.method == "nearest":
            errors = {label: _total(weight_OI, gram_II, round_to_nearest(weight_OI, format, what=what), format)
                      for label, format in self._formats()}
        else:
            errors = {label: gain * searched(format) for label, format in self._formats()}
        return {label: error / whole for label, error in (errors | {"probe": probe}).items()}

    def _formats(self) -> list[tuple[str, Format]]:
        return [(label, Format.parse(label)) for label in self.formats]


def sampled(weight_OI: Tensor, rows: int) -> Tensor:
    """About so many rows, evenly spaced, float32."""
    return weight_OI[:: max(1, len(weight_OI) // rows)].float()


def units_of(row: LayerSpec) -> dict[str, int]:
    """How many units the inputs of `o` and `down` come in that a layer can have fewer of: heads and channels."""
    found = {}
    if isinstance(row.mixer, Attention) and row.mixer.shares is None and row.mixer.kv_heads > 1:
        found["o"] = row.mixer.kv_heads
    if row.feed_forward and not row.feed_forward.experts:
        found["down"] = row.feed_forward.width
    return found


def kept_units(share: float, units: int, name: str) -> int:
    """How many of the units a share keeps: whole heads, and channels in multiples of STEP where there are enough."""
    kept = int(share * units)
    return max(1, kept if name == "o" or units < 2 * STEP else kept // STEP * STEP)


def _total(weight_OI: Tensor, gram_II: Tensor, rounded: tuple[Tensor, Tensor, Tensor | None], format: Format) -> float:
    return float(output_error(weight_OI, gram_II, rounded, format).sum().clamp_min(torch.finfo(torch.float32).tiny))
