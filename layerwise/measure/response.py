"""What one disturbance at a time does to the predictions: KL(original || changed), matrix by matrix.

Each matrix in turn is rounded to nearest in the format PROBE with everything else untouched. For a small
disturbance the divergence grows in proportion to the squared error of the matrix's outputs, so that

    loss(matrix, alternative) = response(matrix) * error(alternative) / error(probe)

with errors from `output-error`: two cheap columns predict any number of alternatives. Where the error is not
small in this sense the alternative itself is tried: halves of a layer and whole layers left out, and token
tables in other formats. What bfloat16 rounding alone does is subtracted (see `floor.py`).
Cost: layers^2 / 2 layer runs per matrix, half of starting over for each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import nn

from layerwise.errors import BadOption
from layerwise.measure.base import Intervention, Trial
from layerwise.measure.ending import Ending, kl
from layerwise.measure.floor import FLOOR, Dither, above, floor_column, floor_of, floor_trials
from layerwise.measure.output_error import PROBE
from layerwise.measure.scores import Column, Direction
from layerwise.nets.decoder import MATRICES, Block
from layerwise.spec import Format
from layerwise.stack.base import Skip, Stack
from layerwise.stack.decoder import DecoderStack
from layerwise.transform.drop import Drop
from layerwise.transform.quantize import Quantize, pack_table, values

TABLE_FORMATS = ("8/row=", "6/64", "4/64", "3/64")
DROPS = {"drop": "layer", "drop attention": "attention", "drop feed-forward": "feed_forward"}


@dataclass(frozen=True)
class Response(Intervention):
    """Columns `<matrix>`, and those of `drops`; formats of `tables` fill only the columns' `outside`.
    Output is compared at `tokens` positions of every row (None: all).
    """

    matrices: bool = True
    drops: tuple[str, ...] = tuple(DROPS)
    tables: tuple[str, ...] = TABLE_FORMATS
    tokens: int | None = 128

    name: ClassVar[str] = "response"
    unit: ClassVar[str] = "nats/token"
    important: ClassVar[Direction] = "high"
    about: ClassVar[str] = "what disturbing one matrix, or leaving a part out, does to the predictions"
    for_plans: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for field in ("drops", "tables"):
            object.__setattr__(self, field, tuple(getattr(self, field)))
        for label in self.tables:
            Format.parse(label)
        unknown = sorted(set(self.drops) - set(DROPS))
        if unknown:
            raise BadOption(f"drops {unknown}", expected=f"some of {list(DROPS)}", do="correct the names")

    @property
    def parts(self) -> Mapping[str, str]:
        tried = (*(MATRICES if self.matrices else ()), *self.drops, *self.tables, FLOOR)
        return dict.fromkeys(tried, self.unit)

    def trials(self, stack: Stack) -> list[Trial]:
        assert isinstance(stack, DecoderStack)
        found = [Trial(layer, part) for layer in range(len(stack)) for part in self._inside(stack, layer)]
        outside = ("embedding",) if stack.spec.tied else ("embedding", "head")
        return [*found, *floor_trials(stack), *(Trial(table, label) for table in outside for label in self.tables)]

    def _inside(self, stack: DecoderStack, layer: int) -> list[str]:
        row = stack.spec.rows[layer]
        halves = {"drop attention": row.mixer, "drop feed-forward": row.feed_forward}
        matrices = list(row.matrices(stack.spec.hidden)) if self.matrices else []
        return matrices + [part for part in self.drops if part == "drop" or (halves[part] and all(halves.values()))]

    def alternative(self, stack: Stack, trial: Trial) -> nn.Module | Stack:
        assert isinstance(stack, DecoderStack)
        if isinstance(trial.place, str):
            return _with_table(stack, trial.place, Format.parse(trial.part))
        block, row = stack.block(trial.place), stack.spec.rows[trial.place]
        assert isinstance(block, Block)
        if trial.part == FLOOR:
            return Dither(block)
        if trial.part in DROPS:
            return Drop(DROPS[trial.part]).apply(block, row) or Skip()  # type: ignore[arg-type]
        probe = Quantize(PROBE.bits, PROBE.group, PROBE.symmetric, "nearest", (trial.part,))
        return probe.apply(block, row)

    def score(self, original: Ending, changed: Ending) -> float:
        return kl(original, changed)

    def finish(self, layers: int, values: Mapping[Trial, float]) -> tuple[Column, ...]:
        floor = floor_of(values, layers)
        columns = super().finish(layers, above(values, floor))
        return (*columns, floor_column(self.name, self.unit, floor)) if floor else columns


def _with_table(stack: DecoderStack, name: str, format: Format) -> DecoderStack:
    table = stack.decoder.embedding if name == "embedding" else stack.decoder.head
    assert table is not None
    spec = replace(stack.spec, **{f"{name}_format": format})  # type: ignore[arg-type]
    packed = {name: pack_table(values(table), format, "search")}
    return stack.with_tables(spec, **packed)
