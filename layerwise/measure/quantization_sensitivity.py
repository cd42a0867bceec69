"""What storing one layer in fewer bits does to the output: KL(original || changed), or growth of the loss.

Each layer in turn (or each of its matrices) is quantized with everything else untouched, for every bit width;
so are the embedding and the head, where there is one of its own. The sum over layers predicts the loss of a
plan that mixes widths. In less than float32 the divergence that rounding alone makes is measured too and
subtracted (see `floor.py`); it stands in the column `floor`, below which a loss is no more than rounding.
Cost: layers^2 / 2 layer runs per width, half of starting over for each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from torch import nn

from layerwise.errors import BadOption
from layerwise.measure.base import Intervention, Trial
from layerwise.measure.ending import Ending, kl
from layerwise.measure.floor import FLOOR, Dither, above, floor_column, floor_of, floor_trials
from layerwise.measure.scores import Column, Direction
from layerwise.nets.decoder import MATRICES
from layerwise.spec import BITS
from layerwise.stack.base import Stack
from layerwise.stack.decoder import DecoderStack
from layerwise.transform.quantize import Method, Quantize, pack_table, values

LEGAL = {"per": ("layer", "matrix"), "metric": ("kl", "loss"), "method": ("nearest", "search")}


@dataclass(frozen=True)
class QuantizationSensitivity(Intervention):
    """Columns `<bits>`, or `<matrix>:<bits>` with `per="matrix"`.

    `method`, `group` and `symmetric` are those of the transform `quantize`. Output is compared at `tokens`
    positions of every row (None: all). With `outside`, the embedding (and the head, where it is not the
    embedding) are tried too and stand in the columns' `outside`.
    """

    bits: tuple[int, ...] = (8, 4, 3, 2)
    per: Literal["layer", "matrix"] = "layer"
    metric: Literal["kl", "loss"] = "kl"
    method: Method = "nearest"
    group: int | None = None
    symmetric: bool | None = None
    tokens: int | None = 32
    outside: bool = True

    name: ClassVar[str] = "quantization-sensitivity"
    unit: ClassVar[str] = "nats/token"
    important: ClassVar[Direction] = "high"
    about: ClassVar[str] = "what storing the layer in so many bits does to the output"

    def __post_init__(self) -> None:
        object.__setattr__(self, "bits", tuple(self.bits))
        for field, legal in LEGAL.items():
            if getattr(self, field) not in legal:
                raise BadOption(f"{field}={getattr(self, field)!r} for {self.name}",
                                expected=f"one of {legal}", do="choose one of them")
        if not self.bits or set(self.bits) - set(BITS):
            raise BadOption(f"bits={self.bits} for {self.name}", expected=f"widths among {BITS}",
                            do="choose from them")

    @property
    def parts(self) -> Mapping[str, str]:
        prefixes = [""] if self.per == "layer" else [f"{matrix}:" for matrix in MATRICES]
        widths = {f"{prefix}{bits}": self.unit for prefix in prefixes for bits in self.bits}
        return widths | ({FLOOR: self.unit} if self.metric == "kl" else {})

    def trials(self, stack: Stack) -> list[Trial]:
        assert isinstance(stack, DecoderStack)
        present = [row.matrices(stack.spec.hidden) for row in stack.spec.rows]
        parts = [part for part in self.parts if part != FLOOR]
        inside = [Trial(layer, part) for layer, matrices in enumerate(present) for part in parts
                  if (matrices if self.per == "layer" else part.split(":")[0] in matrices)]
        if self.metric == "kl":
            inside += floor_trials(stack)
        if self.per == "matrix" or not self.outside:
            return inside
        tables = ["embedding"] if stack.spec.tied else ["embedding", "head"]
        return inside + [Trial(table, part) for table in tables for part in parts]

    def alternative(self, stack: Stack, trial: Trial) -> nn.Module | Stack:
        assert isinstance(stack, DecoderStack)
        if trial.part == FLOOR and isinstance(trial.place, int):
            return Dither(stack.block(trial.place))
        matrix, _, bits = trial.part.rpartition(":")
        quantize = Quantize(int(bits), self.group, self.symmetric, self.method, (matrix,) if matrix else None)
        if isinstance(trial.place, int):
            return quantize.apply(stack.block(trial.place), stack.spec.rows[trial.place])
        table = stack.decoder.embedding if trial.place == "embedding" else stack.decoder.head
        assert table is not None
        spec = replace(stack.spec, **{f"{trial.place}_format": quantize.format})  # type: ignore[arg-type]
        packed = {trial.place: pack_table(values(table), quantize.format, self.method)}
        return stack.with_tables(spec, **packed)

    def score(self, original: Ending, changed: Ending) -> float:
        return kl(original, changed) if self.metric == "kl" else changed.loss - original.loss

    def finish(self, layers: int, values: Mapping[Trial, float]) -> tuple[Column, ...]:
        if self.metric == "loss":
            return super().finish(layers, values)
        floor = floor_of(values, layers)
        columns = super().finish(layers, above(values, floor))
        return (*columns, floor_column(self.name, self.unit, floor)) if floor else columns
