"""What one disturbance at a time does to the predictions: KL(original || changed), matrix by matrix.

Each matrix in turn is rounded to nearest in the format PROBE with everything else untouched. For a small
disturbance the divergence grows in proportion to the squared error of the matrix's outputs, so that

    loss(matrix, alternative) = response(matrix) * error(alternative) / error(probe)

with errors from `output-error`: two cheap columns predict any number of alternatives. Where the error is not
small in this sense the alternative itself is tried: halves of a layer and whole layers left out, the keys and
values of another layer read instead, caches of integers, and token tables in other formats. What bfloat16 rounding
alone does is subtracted (see `floor.py`).
Cost: layers^2 / 2 layer runs per matrix, half of starting over for each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from torch import Tensor, nn

from layerwise.errors import BadOption
from layerwise.measure.base import Intervention, Trial, digest
from layerwise.measure.ending import Ending, kl
from layerwise.measure.floor import FLOOR, Dither, above, floor_column, floor_of, floor_trials
from layerwise.measure.output_error import PROBE
from layerwise.measure.scores import Column, Direction
from layerwise.nets.decoder import MATRICES, Block
from layerwise.spec import LayerSpec, Precision, TableFormat, parse_table_format
from layerwise.stack.base import Skip, Stack
from layerwise.stack.decoder import DecoderStack
from layerwise.transform.cache_precision import CachePrecision
from layerwise.transform.drop import Drop
from layerwise.transform.quantize import Quantize, pack_table, values
from layerwise.transform.share_kv import ShareKV, sources

TABLE_FORMATS = ("8/row=", "6/64", "4/64", "3/64")
DROPS = {"drop": "layer", "drop attention": "attention", "drop feed-forward": "feed_forward"}
SHARES = {"share 1": 1, "share 2": 2}
"""Reading the keys and values of the nearest earlier layer that has such, and of the second nearest."""
CACHES: dict[str, Precision] = {"cache int8": "int8", "cache int4": "int4"}
"""Keys and values as a cache of integers holds them."""


@dataclass(frozen=True)
class Response(Intervention):
    """Columns `<matrix>`, and those of `drops`, `shares` and `caches`; formats of `tables` fill only the columns'
    `outside`. Output is compared at `tokens` positions of every row (None: all). `order_V` holds the tokens, the most
    frequent first, for formats of tables whose rows differ by that (`8/row=@8192+3/64`).
    """

    matrices: bool = True
    drops: tuple[str, ...] = tuple(DROPS)
    tables: tuple[str, ...] = TABLE_FORMATS
    tokens: int | None = 128
    shares: tuple[str, ...] = ()
    caches: tuple[str, ...] = ()
    order_V: Tensor | None = field(default=None, repr=False, compare=False)

    name: ClassVar[str] = "response"
    unit: ClassVar[str] = "nats/token"
    important: ClassVar[Direction] = "high"
    about: ClassVar[str] = "what disturbing one matrix, or leaving a part out, does to the predictions"
    for_plans: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("drops", "tables", "shares", "caches"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for label in self.tables:
            parse_table_format(label)
        for what, given, known in (("drops", self.drops, DROPS), ("shares", self.shares, SHARES),
                                   ("caches", self.caches, CACHES)):
            if unknown := sorted(set(given) - set(known)):
                raise BadOption(f"{what} {unknown}", expected=f"some of {list(known)}", do="correct the names")

    def to_json(self) -> dict[str, Any]:
        """Plain values; the order of the tokens as a digest."""
        order = digest([] if self.order_V is None else [self.order_V])
        return Intervention.to_json(replace(self, order_V=None)) | {"order_V": order}

    @property
    def parts(self) -> Mapping[str, str]:
        tried = (*(MATRICES if self.matrices else ()), *self.drops, *self.shares, *self.caches,
                 *self.tables, FLOOR)
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
        readable = len(sources(stack.spec, layer))
        return [*matrices, *(part for part in self.drops if part == "drop" or (halves[part] and all(halves.values()))),
                *(part for part in self.shares if SHARES[part] <= readable),
                *(part for part in self.caches if _changes(CachePrecision(CACHES[part]), row))]

    def sources(self, stack: Stack) -> frozenset[int]:
        most = max((SHARES[part] for part in self.shares), default=0)
        return frozenset(source for layer in range(len(stack)) for source in sources(stack.spec, layer)[:most])

    def alternative(self, stack: Stack, trial: Trial) -> nn.Module | Stack:
        assert isinstance(stack, DecoderStack)
        if isinstance(trial.place, str):
            return _with_table(stack, trial.place, parse_table_format(trial.part), self.order_V)
        block, row = stack.block(trial.place), stack.spec.rows[trial.place]
        assert isinstance(block, Block)
        if trial.part == FLOOR:
            return Dither(block)
        if trial.part in DROPS:
            return Drop(DROPS[trial.part]).apply(block, row) or Skip()  # type: ignore[arg-type]
        if trial.part in SHARES:
            return ShareKV(sources(stack.spec, trial.place)[SHARES[trial.part] - 1]).apply(block, row)
        if trial.part in CACHES:
            return CachePrecision(CACHES[trial.part]).apply(block, row)
        probe = Quantize(PROBE.bits, PROBE.group, PROBE.symmetric, "nearest", (trial.part,))
        return probe.apply(block, row)

    def score(self, original: Ending, changed: Ending) -> float:
        return kl(original, changed)

    def finish(self, layers: int, values: Mapping[Trial, float]) -> tuple[Column, ...]:
        floor = floor_of(values, layers)
        columns = super().finish(layers, above(values, floor))
        return (*columns, floor_column(self.name, self.unit, floor)) if floor else columns


def _changes(change: CachePrecision, row: LayerSpec) -> bool:
    try:
        return change.edit(row, 0) != row
    except BadOption:
        return False


def _with_table(stack: DecoderStack, name: str, format: TableFormat, order_V: Tensor | None) -> DecoderStack:
    table = stack.decoder.embedding if name == "embedding" else stack.decoder.head
    assert table is not None
    spec = replace(stack.spec, **{f"{name}_format": format})  # type: ignore[arg-type]
    packed = {name: pack_table(values(table), format, "search", order_V=order_V)}
    return stack.with_tables(spec, **packed)
