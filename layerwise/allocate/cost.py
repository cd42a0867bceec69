"""What a layer costs in every currency, from its row alone; time from a clock that measured it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from layerwise.spec import LayerSpec, StackSpec

Cost = dict[str, float]


class Clock(Protocol):
    """Measured milliseconds to decode one token on one machine."""

    def row(self, row: LayerSpec) -> float:
        """Time of one layer."""

    def outside(self, spec: StackSpec) -> float:
        """Time of everything that is not a layer: embedding, final norm, head."""


@dataclass(frozen=True)
class Clocks:
    """A clock of decoding beside one that times reading a prompt: cost tables then hold both."""

    decode: Clock
    prefill: Clock

    def row(self, row: LayerSpec) -> float:
        """Time of one layer while decoding."""
        return self.decode.row(row)

    def outside(self, spec: StackSpec) -> float:
        """Time of everything that is not a layer while decoding."""
        return self.decode.outside(spec)


def row_cost(row: LayerSpec | None, spec: StackSpec, clock: Clock | None = None) -> Cost:
    """The cost of one layer of `spec` in each currency; nothing where the layer is gone."""
    if row is None:
        cost = {"bytes": 0.0, "parameters": 0.0, "layers": 0.0, "cache": 0.0, "bits": 0.0}
        return cost | _times(clock, lambda _: 0.0)
    size = row.bytes(spec.hidden, spec.dtype)
    cost = _sizes(size, row.parameters(spec.hidden), spec) | {"layers": 1.0}
    cost["cache"] = float(row.cache_bytes(spec.context, spec.dtype))
    return cost | _times(clock, lambda clock: clock.row(row))


def table_cost(target: str, spec: StackSpec, clock: Clock | None = None) -> Cost:
    """The cost of the "embedding" or the "head" of `spec` as it is stored there.

    Time goes to the table that makes the logits: the head, or the embedding where they are one.
    """
    size = spec.embedding_bytes() if target == "embedding" else spec.head_bytes()
    cost = _sizes(size, spec.vocabulary * spec.hidden, spec) | {"layers": 0.0, "cache": 0.0}
    makes_logits = target == "head" or spec.tied
    return cost | _times(clock, lambda clock: clock.outside(spec) if makes_logits else 0.0)


def rest_cost(spec: StackSpec, clock: Clock | None = None) -> Cost:
    """The cost of what no choice changes, such as the final norm."""
    stored = [table_cost(target, spec) for target in tables(spec)]
    stored += [row_cost(row, spec) for row in spec.rows]
    size = spec.bytes() - round(sum(part["bytes"] for part in stored))
    cost = _sizes(size, spec.parameters() - round(sum(part["parameters"] for part in stored)), spec)
    cost |= {"layers": 0.0, "cache": 0.0}
    return cost | _times(clock, lambda clock: 0.0 if tables(spec) else clock.outside(spec))


def totals(spec: StackSpec, clock: Clock | None = None) -> Cost:
    """The cost of the whole model in each currency."""
    parts = [row_cost(row, spec, clock) for row in spec.rows] + [rest_cost(spec, clock)]
    parts += [table_cost(target, spec, clock) for target in tables(spec)]
    return {currency: sum(part[currency] for part in parts) for currency in parts[-1]}


def tables(spec: StackSpec) -> tuple[str, ...]:
    """The targets outside the rows that can be stored in another format."""
    if not spec.vocabulary or spec.outside:
        return ()
    return ("embedding",) if spec.tied else ("embedding", "head")


def _times(clock: Clock | None, time: Callable[[Clock], float]) -> Cost:
    prefill = clock.prefill if isinstance(clock, Clocks) else None
    clocks = {"milliseconds": clock, "prefill": prefill}
    return {currency: time(one) for currency, one in clocks.items() if one is not None}


def _sizes(size: int, parameters: int, spec: StackSpec) -> Cost:
    bits = 8 * size / (spec.parameters() or 1)
    return {"bytes": float(size), "parameters": float(parameters), "bits": bits}
