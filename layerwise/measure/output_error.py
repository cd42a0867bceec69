"""How far a matrix's outputs move when it is stored in another format, before anything is built.

    error = tr(D E G E' D) / tr(D W G W' D),   E = W - W_stored,   G = sum of x x' over the inputs x it sees

with D how much each output counts. For matrices that write to the residual stream that is what the output is multiplied
with before (see `transform/gains.py`), times the root of what predictions feel of its channel (see `sensitivity.py`)
where that is given; for all others 1.
Two matrices that lose the same share of their output need not matter the same; what that share costs the
predictions is what `response` measures. Errors of GPTQ are taken from plain rounding with searched scales
and one GPTQ run of the matrix: how much it gains changes little from format to format.
Source of the error measure: Hassibi and Stork, Optimal Brain Surgeon, 1992; Frantar et al., GPTQ, 2022.

Shapes: O outputs (a sample of them), I inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from layerwise.errors import BadOption
from layerwise.measure.base import Reading, digest
from layerwise.measure.scores import Direction
from layerwise.nets.decoder import MATRICES, Block
from layerwise.spec import Attention, Format, LayerSpec
from layerwise.stack.base import Stack, State
from layerwise.stack.decoder import DecoderStack
from layerwise.transform.gains import LAST, gained, gains
from layerwise.transform.gptq import output_error
from layerwise.transform.gram import grams, normed
from layerwise.transform.learn_rotation import LearnRotation, rotatable
from layerwise.transform.output_error import energy, low_rank_errors, narrow_errors, rank_errors, unseen
from layerwise.transform.quantize import SEARCH_STEPS, SWEEPS, Method, rounded_by, table_gram, values
from layerwise.transform.rotate import fold_rotation, rotated_gram
from layerwise.transform.rounding import round_to_nearest

Rounded = tuple[Tensor, Tensor, Tensor | None]

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
    `sensitivity` is what predictions feel of each channel of the stream, by layer.
    """

    formats: tuple[str, ...] = FORMATS
    method: Method = "gptq"
    ranks: tuple[float, ...] = ()
    widths: tuple[float, ...] = ()
    rotated: bool = False
    sensitivity: tuple[Tensor, ...] = field(default=(), repr=False, compare=False)

    name: ClassVar[str] = "output-error"
    unit: ClassVar[str] = "share"
    important: ClassVar[Direction | None] = "high"
    about: ClassVar[str] = "share of a matrix's output that storing it so changes"
    for_plans: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("formats", "ranks", "widths"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not all(0 < share < 1 for share in (*self.ranks, *self.widths)):
            raise BadOption(f"ranks={self.ranks}, widths={self.widths} for {self.name}", expected="shares below 1",
                            do="give what is to be kept, such as 0.5")
        for label in self.formats:
            Format.parse(label)
        if not self.formats:
            raise BadOption(f"no formats for {self.name}", expected="labels such as 4/128", do="name some")

    def to_json(self) -> dict[str, Any]:
        """Plain values; the sensitivity as a digest."""
        return Reading.to_json(replace(self, sensitivity=())) | {"sensitivity": digest(self.sensitivity)}

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
        gram_of, tokens = grams(block, layer, states), sum(state.hidden.shape[:2].numel() for state in states)
        for name, matrix in block.matrices().items():
            if name in gram_of:
                weight_OI, gram_II, what = values(matrix), gram_of[name], f"matrix {name!r} of layer {layer}"
                gain_O, felt_O = gains(block, name), self._felt(layer, name)
                errors = self.of_matrix(weight_OI, gram_II, what, _both(gain_O, felt_O))
                found |= {f"{name}:{part}": error for part, error in errors.items()}
                found |= self._structural(gained(weight_OI, gain_O), gram_II, felt_O, name, stack.spec.rows[layer],
                                          tokens)
        if self.rotated and rotatable(stack.spec.rows, layer):
            found |= self._after_rotation(block, layer, stack.spec.rows[layer], gram_of)
        return found

    def _felt(self, layer: int, name: str) -> Tensor | None:
        """What predictions feel of an error of 1 in each output of a matrix, [O]; None where that is not known."""
        return self.sensitivity[layer].sqrt() if self.sensitivity and name in LAST else None

    def _after_rotation(self, block: Block, layer: int, row: LayerSpec, gram_of: Mapping[str, Tensor]
                        ) -> dict[str, float]:
        """Relative errors of v and o by format once their rotation is learned; their outputs only turn with it."""
        mixer = row.mixer
        assert isinstance(mixer, Attention)
        turn_KDD = LearnRotation().learned(block, mixer, gram_of)
        turned = fold_rotation(block, mixer, turn_KDD)
        inputs = {"v": gram_of["v"], "o": rotated_gram(gram_of["o"], mixer, turn_KDD)}
        return {f"{name}:{ROTATED} {part}": error for name, gram_II in inputs.items()
                for part, error in self.of_matrix(values(turned.matrix(name)), gram_II,
                                                  gain_O=_both(gains(block, name), self._felt(layer, name))).items()
                if part != "probe"}

    def _structural(self, weight_OI: Tensor, gram_II: Tensor, felt_O: Tensor | None, name: str, row: LayerSpec,
                    tokens: int) -> dict[str, float]:
        """Relative errors of ranks and widths, for the weight with its gains."""
        found: dict[str, float] = {}
        whole = energy(gained(weight_OI, felt_O), gram_II) or 1.0
        if self.ranks:
            outputs, inputs = weight_OI.shape
            ranks = [int(share * outputs * inputs / (outputs + inputs)) for share in self.ranks]
            if felt_O is None:
                errors_R = low_rank_errors(weight_OI, gram_II)
                errors = [float(errors_R[min(rank, len(errors_R) - 1)]) for rank in ranks]
            else:
                errors = rank_errors(weight_OI, gram_II, ranks, felt_O)
            found |= {f"{name}:rank {share:g}": error / whole for share, error in zip(self.ranks, errors, strict=True)}
        units = units_of(row).get(name)
        if self.widths and units:
            unit = weight_OI.shape[1] // units
            errors_N, _ = narrow_errors(weight_OI, gram_II, unit, felt_O)
            for share in self.widths:
                kept = kept_units(share, units, name)
                found[f"{name}:width {share:g}"] = float(errors_N[kept]) / whole * unseen(kept * unit, tokens)
        return found

    def of_tables(self, stack: Stack, states: Sequence[State]) -> Mapping[str, Mapping[str, float]]:
        if not isinstance(stack, DecoderStack) or self.method not in SWEEPS:
            return {}
        gram_CC = table_gram(normed(stack, states), stack.spec.tied)
        place, table = ("embedding", stack.decoder.embedding) if stack.spec.tied else ("head", stack.decoder.head)
        assert table is not None
        weight_VC = values(table)
        weight_VC = weight_VC[picked(len(weight_VC), TABLE_ROWS)[0].to(weight_VC.device)].float()
        found = {}
        for label, format in self._formats():
            plain, better = (_total(weight_VC, gram_CC, rounded_by(method, weight_VC, format, gram), format)
                             for method, gram in ((SEARCH, None), (self.method, gram_CC)))
            found[f"table:{label}"] = better / plain
        return {place: found}

    def of_matrix(self, weight_OI: Tensor, gram_II: Tensor, what: str = "the matrix",
                  gain_O: Tensor | None = None) -> dict[str, float]:
        """Relative squared output error by format label, and of the probe."""
        row_S, times_S = picked(len(weight_OI), ROWS, gain_O)
        weight_OI = weight_OI[row_S.to(weight_OI.device)].float()
        whole = float(times_S.to(weight_OI) @ ((weight_OI @ gram_II) * weight_OI).sum(1)) or 1.0
        importance_I = gram_II.diagonal()

        def total(rounded: Rounded, format: Format) -> float:
            return _total(weight_OI, gram_II, rounded, format, times_S)

        def searched(format: Format) -> float:
            return total(round_to_nearest(weight_OI, format, search=SEARCH_STEPS, importance_I=importance_I, what=what),
                         format)

        probe, left = total(round_to_nearest(weight_OI, PROBE, what=what), PROBE), 1.0
        if self.method in SWEEPS:
            left = total(rounded_by(self.method, weight_OI, PROBE, gram_II, what), PROBE) / max(searched(PROBE), 1e-30)
        if self.method == "nearest":
            errors = {label: total(round_to_nearest(weight_OI, format, what=what), format)
                      for label, format in self._formats()}
        else:
            errors = {label: left * searched(format) for label, format in self._formats()}
        return {label: error / whole for label, error in (errors | {"probe": probe}).items()}

    def _formats(self) -> list[tuple[str, Format]]:
        return [(label, Format.parse(label)) for label in self.formats]


def _both(gain_O: Tensor | None, felt_O: Tensor | None) -> Tensor | None:
    """How much each output counts."""
    return felt_O if gain_O is None else gain_O if felt_O is None else felt_O * gain_O.to(felt_O)


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


def picked(outputs: int, rows: int, gain_O: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(places, times): about `rows` outputs that stand for all, and how often each counts.

    Evenly spaced; with gains, evenly spaced along the sum of their squares, so that large ones count more often.
    """
    if gain_O is None:
        row_S = torch.arange(0, outputs, max(1, outputs // rows))
        return row_S, torch.ones(len(row_S))
    upto_O = gain_O.double().cpu().square().cumsum(0)
    place_S = (torch.arange(rows, dtype=torch.float64) + 0.5) / rows * upto_O[-1]
    row_S, times_S = torch.searchsorted(upto_O, place_S).unique(return_counts=True)
    return row_S, times_S.float()


def _total(weight_OI: Tensor, gram_II: Tensor, rounded: Rounded, format: Format, times_O: Tensor | None = None
           ) -> float:
    """The error of all outputs, each as often as it counts."""
    error_O = output_error(weight_OI, gram_II, rounded, format)
    error_O = error_O if times_O is None else error_O * times_O.to(error_O)
    return float(error_O.sum().clamp_min(torch.finfo(torch.float32).tiny))
