"""`Choice`: one alternative for one layer, with what it is predicted to lose and what it costs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from layerwise.allocate.cost import Clock, Cost, rest_cost, row_cost, table_cost, tables
from layerwise.allocate.edits import edited_row, edited_table
from layerwise.allocate.losses import DEPTH, Alternative, Losses, Target, predict, tried_columns
from layerwise.errors import BadOption
from layerwise.measure.scores import Scores
from layerwise.spec import LayerSpec, StackSpec

TABLE_BITS = (8, 6, 4)
ROW_BITS = (8, 6, 5, 4, 3, 2)


@dataclass(frozen=True)
class Choice:
    """One alternative for one target.

    `edit` is the transform's name and arguments, None to keep; `row` the edited row, None where the layer
    is gone or the target is no layer. `loss` is in the unit of the prediction. `cost` holds this target's
    share of bytes, parameters, layers, bits (per parameter of the original) and, with a clock, milliseconds.
    """

    target: Target
    label: str
    edit: tuple[str, Mapping[str, Any]] | None
    row: LayerSpec | None
    loss: float
    cost: Mapping[str, float]


Groups = list[list[Choice]]
"""The choices of each target; exactly one of each list is taken."""


def keep() -> Alternative:
    """Leave the layer as it is."""
    return Alternative("keep", tables=True)


def quantized(bits: int, *, tables: bool = True, **arguments: Any) -> Alternative:
    """Pack the matrices at `bits`, in the default format for that width unless `arguments` say otherwise.

    `arguments` are those of the quantize transform: group, symmetric, method, matrices.
    """
    from layerwise.transform.quantize import default_format

    format = default_format(bits)
    settings = {"bits": bits, "group": format.group, "symmetric": format.symmetric, **arguments}
    measured = f"quantization-sensitivity:{bits}"
    return Alternative(f"{bits} bits", "quantize", settings, measured, 4.0**-bits, tables)


def dropped(part: Literal["layer", "attention", "feed_forward"] = "layer") -> Alternative:
    """Take the layer away, or one half of it (which counts as half the distortion)."""
    if part == "layer":
        return Alternative("drop", "drop", {"part": part}, "leave-one-out", 1.0)
    return Alternative(f"drop {part}", "drop", {"part": part}, f"leave-one-out:{part}", 0.5)


def defaults(scores: Scores, by: str | Sequence[str] | None = None) -> list[Alternative]:
    """Keep and every bit width; dropping too where a column says what taking a layer away does."""
    names = scores.columns if by is None else [by] if isinstance(by, str) else by
    parts = [dropped("attention"), dropped("feed_forward")]
    offered = [part for part in parts if by is None and tried_columns(scores, part)]
    if DEPTH & set(names):
        offered.append(dropped())
    return [keep(), *(quantized(bits, tables=bits in TABLE_BITS) for bits in ROW_BITS), *offered]


def make_choices(
    scores: Scores,
    alternatives: Sequence[Alternative] | None = None,
    by: str | Sequence[str] | None = None,
    clock: Clock | None = None,
) -> tuple[Groups, Losses]:
    """The choices of every layer in order of depth, then of embedding and head, then the fixed rest.

    An alternative is left out for a target it cannot be made for, does not change, or whose loss is not
    known there. The rest (final norm and the like) is a group of one, so that costs add up to the whole
    model. Raises BadOption and UnknownName as `predict` does.
    """
    alternatives = defaults(scores, by) if alternatives is None else alternatives
    losses = predict(scores, alternatives, by)
    spec = scores.spec
    groups = [_row_choices(layer, alternatives, losses, spec, clock) for layer in range(len(spec.rows))]
    groups += [_table_choices(target, alternatives, losses, spec, clock) for target in tables(spec)]
    groups.append([Choice("rest", "keep", None, None, 0.0, rest_cost(spec, clock))])
    return groups, losses


def _row_choices(layer: int, alternatives: Sequence[Alternative], losses: Losses, spec: StackSpec,
                 clock: Clock | None) -> list[Choice]:
    row, choices = spec.rows[layer], []
    for alternative in alternatives:
        try:
            edited = edited_row(row, spec.hidden, alternative.transform, alternative.arguments)
        except BadOption:
            continue
        if alternative.transform is None or edited != row:
            choices.append(_choice(layer, alternative, edited, losses, row_cost(edited, spec, clock)))
    return _known(choices, f"layer {layer}")


def _table_choices(target: str, alternatives: Sequence[Alternative], losses: Losses, spec: StackSpec,
                   clock: Clock | None) -> list[Choice]:
    choices = []
    for alternative in alternatives:
        if alternative.tables:
            edited = edited_table(spec, target, alternative.transform, alternative.arguments)
            if edited != spec:
                choices.append(_choice(target, alternative, None, losses, table_cost(target, edited, clock)))
    kept = _choice(target, keep(), None, losses, table_cost(target, spec, clock))
    return _known([kept, *choices], f"the {target}")


def _choice(target: Target, alternative: Alternative, row: LayerSpec | None, losses: Losses,
            cost: Cost) -> Choice:
    edit = (alternative.transform, dict(alternative.arguments)) if alternative.transform else None
    return Choice(target, alternative.label, edit, row, losses.of(alternative, target), cost)


def _known(choices: list[Choice], what: str) -> list[Choice]:
    known = [choice for choice in choices if math.isfinite(choice.loss)]
    if not known:
        raise BadOption(f"no alternative with a known loss for {what}", expected="at least one",
                        do="add keep() to the alternatives, or measure the ones that are there")
    return known
