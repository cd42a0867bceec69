"""`Choice`: one alternative for one layer, with what it is predicted to lose and what it costs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from layerwise.allocate.cost import Clock, Cost, rest_cost, row_cost, table_cost, tables
from layerwise.allocate.edits import edited_row, edited_table
from layerwise.allocate.losses import DEPTH, Alternative, Losses, Target, predict, tried_columns
from layerwise.allocate.mixtures import TURNED, Option, combined, merged_edits, useful
from layerwise.allocate.plan import Edit
from layerwise.errors import BadOption
from layerwise.measure.output_error import ROTATED, kept_units, units_of
from layerwise.measure.scores import Scores
from layerwise.nets.decoder import MATRICES
from layerwise.spec import Attention, Format, LayerSpec, StackSpec, Tiers, parse_table_format
from layerwise.transform.learn_rotation import rotatable

TABLE_BITS = (8, 6, 4)
ROW_BITS = (8, 6, 5, 4, 3, 2)
KEYS = ("share-kv", "cache-precision")
"""Transforms of what a layer keeps of every token."""


@dataclass(frozen=True)
class Choice:
    """One alternative for one target.

    `edits` make it so, none to keep; `row` is the edited row, None where the layer is gone or the target is no
    layer, and `before` the row as it was. `loss` is in the unit of the prediction. `cost` holds this target's
    share of bytes, parameters, layers, cache, bits (per parameter of the original) and, with a clock, milliseconds.
    """

    target: Target
    label: str
    edits: tuple[Edit, ...]
    row: LayerSpec | None
    loss: float
    cost: Mapping[str, float]
    before: LayerSpec | None = None


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


def mixed(labels: Sequence[str], method: str = "gptq", tables: Sequence[str] | None = None) -> list[Alternative]:
    """Each matrix by itself in any of the formats with these labels (see `Format.label`), the tables in `tables`."""
    found = []
    for label in labels:
        format = Format.parse(label)
        settings = _rounding(format, method)
        found.append(Alternative(label, "quantize", settings, f"output-error:{label}", 4.0**-format.bits,
                                 tables=tables is None or label in tables, each=True))
    return found


def tiered(labels: Sequence[str], method: str = "gptq") -> list[Alternative]:
    """Token tables whose rows differ by how frequent their tokens are, as the labels say (see `Tiers`)."""
    found = []
    for label in labels:
        format = parse_table_format(label)
        assert isinstance(format, Tiers)
        settings = _rounding(format.rare, method) | {"frequent": format.frequent.label, "frequent_rows": format.rows}
        found.append(Alternative(label, "quantize", settings, f"output-error:{label}", 4.0**-format.rare.bits,
                                 tables=True))
    return found


def _rounding(format: Format, method: str) -> dict[str, Any]:
    """The arguments of the quantize transform for a format."""
    return {"bits": format.bits, "group": format.group, "symmetric": format.symmetric, "method": method}


def factored(shares: Sequence[float], labels: Sequence[str], method: str = "gptq") -> list[Alternative]:
    """Each matrix by itself as factors with a share of its parameters, the factors in one of the formats."""
    return [Alternative(f"rank {share:g}, {inner.label}", "low-rank", {"rank": share}, f"output-error:rank {share:g}",
                        1.0 - share, each=True, then=inner)
            for share in shares for inner in mixed(labels, method, tables=())]


def factors(shares: Sequence[float]) -> list[Alternative]:
    """Each matrix by itself as dense factors with a share of its parameters."""
    return [Alternative(f"rank {share:g}", "low-rank", {"rank": share}, f"output-error:rank {share:g}", 1.0 - share,
                        each=True) for share in shares]


def rotated() -> Alternative:
    """Rotations of values learned before v and o are rounded; offered where the errors after them were measured."""
    return Alternative(ROTATED, "learn-rotation")


def narrowed(shares: Sequence[float], spec: StackSpec) -> list[Alternative]:
    """Fewer channels of the feed-forward half, or fewer key-value heads with their queries."""
    found, units = [], units_of(spec.rows[0]) if spec.rows else {}
    for name, field in (("down", "width"), ("o", "kv_heads")):
        for share in shares:
            kept = kept_units(share, units.get(name, 1), name)
            if name in units and kept < units[name]:
                measured = f"output-error:{name}:width {share:g}"
                found.append(Alternative(f"{field} {kept}", "narrow", {field: kept}, measured, (1.0 - share) / 2))
    return list({item.label: item for item in reversed(found)}.values())[::-1]


def shared(count: int = 2) -> list[Alternative]:
    """No keys and values of its own, but those of one of the `count` nearest earlier layers that it could read."""
    return [Alternative(f"share {nearest}", "share-kv", {"nearest": nearest}, f"response:share {nearest}", 0.25)
            for nearest in range(1, count + 1)]


def coded(fewer: Sequence[Alternative] = ()) -> list[Alternative]:
    """Keys and values kept as integers of 8 or 4 bits, of all heads and of each of the `fewer`."""
    codes = [Alternative(f"cache int{bits}", "cache-precision", {"precision": f"int{bits}"},
                         f"response:cache int{bits}", 4.0**-bits) for bits in (8, 4)]
    both = [replace(item, label=f"{item.label}, {code.label}", distortion=item.distortion + code.distortion, then=code)
            for item in fewer for code in codes]
    return [*codes, *both]


def dropped(part: Literal["layer", "attention", "feed_forward"] = "layer") -> Alternative:
    """Take the layer away, or one half of it (which counts as half the distortion)."""
    if part == "layer":
        return Alternative("drop", "drop", {"part": part}, "leave-one-out", 1.0)
    return Alternative(f"drop {part.replace('_', '-')}", "drop", {"part": part}, f"leave-one-out:{part}", 0.5)


def defaults(scores: Scores, by: str | Sequence[str] | None = None) -> list[Alternative]:
    """Keep and every bit width; dropping too where a column says what taking a layer away does.

    Where output errors and responses were measured, every matrix by itself in every format they know, and token tables
    in the tiers that were tried.
    """
    labels = [name.split(":", 2)[2] for name in scores.columns if name.startswith("output-error:")]
    known = [label for label in dict.fromkeys(labels) if label != "probe" and " " not in label]
    if by is None and known and any(name.startswith("response:") for name in scores.columns):
        drops = [dropped(), dropped("attention"), dropped("feed_forward")]
        tiers = [name.partition(":")[2] for name in scores.columns if name.startswith("response:") and "@" in name]
        return [keep(), *mixed(known), *tiered(tiers), rotated(),
                *(drop for drop in drops if tried_columns(scores, drop))]
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
    currencies: Sequence[str] = ("bytes",),
) -> tuple[Groups, Losses]:
    """The choices of every layer in order of depth, then of embedding and head, then the fixed rest.

    Where matrices may differ within a layer, the combinations that matter under limits on `currencies` stand
    beside the plain alternatives.

    An alternative is left out for a target it cannot be made for, does not change, or whose loss is not
    known there. The rest (final norm and the like) is a group of one, so that costs add up to the whole
    model. Raises BadOption and UnknownName as `predict` does.
    """
    alternatives = defaults(scores, by) if alternatives is None else alternatives
    losses = predict(scores, alternatives, by)
    spec = scores.spec
    groups = [_row_choices(layer, alternatives, losses, spec, clock, currencies) for layer in range(len(spec.rows))]
    groups += [_table_choices(target, alternatives, losses, spec, clock) for target in tables(spec)]
    groups.append([Choice("rest", "keep", (), None, 0.0, rest_cost(spec, clock))])
    return groups, losses


def _row_choices(layer: int, alternatives: Sequence[Alternative], losses: Losses, spec: StackSpec,
                 clock: Clock | None, currencies: Sequence[str]) -> list[Choice]:
    row, choices = spec.rows[layer], []
    separate = [alternative for alternative in alternatives if alternative.each] if losses.measured else []
    for alternative in alternatives:
        if alternative in separate or (separate and alternative.transform in (None, *KEYS)):
            continue  # among the mixtures
        here = alternative.at(layer, spec)
        if here is None:
            continue
        try:
            edited = _edited(row, here, spec.hidden)
        except BadOption:
            continue
        if here.transform is None or edited != row:
            choices.append(_choice(layer, here, edited, losses, row_cost(edited, spec, clock), row))
    if separate:
        choices += _mixtures(layer, alternatives, losses, spec, clock, currencies)
    return _known(choices, f"layer {layer}")


def _mixtures(layer: int, alternatives: Sequence[Alternative], losses: Losses, spec: StackSpec,
              clock: Clock | None, currencies: Sequence[str]) -> list[Choice]:
    """Every useful combination of one alternative per matrix, halves that are dropped included."""
    row = spec.rows[layer]
    matrices = row.matrices(spec.hidden)
    halves = [[name for name in matrices if MATRICES[name] == part] for part in ("attention", "feed_forward")]
    fronts = [_half(layer, half, alternatives, losses, spec, clock, currencies) for half in filter(None, halves)]
    if not fronts or not all(fronts):
        return []
    base = row_cost(row, spec, clock)
    found = [option for option in combined(fronts, currencies)
             if sum(edit.transform == "drop" for edit in option.edits) < 2]
    return [_mixture(layer, row, option, base, spec.hidden) for option in found]


def _half(layer: int, matrices: Sequence[str], alternatives: Sequence[Alternative], losses: Losses, spec: StackSpec,
          clock: Clock | None, currencies: Sequence[str]) -> list[Option]:
    """What may become of attention or of the feed-forward half: as wide as it is or narrower, reading the keys of
    another layer, or dropped."""
    row, part = spec.rows[layer], MATRICES[matrices[0]]
    whole = [_options(layer, matrix, alternatives, losses, spec, clock, row) for matrix in matrices]
    found = combined(whole, currencies) if all(whole) else []
    linked = bool(spec.sources) or any(alternative.transform == "share-kv" for alternative in alternatives)
    found += _rotated(layer, matrices, whole, alternatives, losses, spec, clock, currencies, linked)
    for alternative in alternatives:
        here = alternative.at(layer, spec)
        if here is None or here.transform is None or not _changes(here, part, row):
            continue
        option = _option(layer, here, (), losses, spec, clock, row)
        if option is None or (edited := _edited(row, here, spec.hidden)) is None:
            continue
        if linked and part == "attention":
            option = replace(option, keys=_keys(row, edited))
        if here.transform == "drop":
            found.append(option)
            continue
        left = [matrix for matrix in matrices if matrix in edited.matrices(spec.hidden)]
        inner = [_options(layer, matrix, alternatives, losses, spec, clock, edited) for matrix in left]
        found += combined([[replace(option, label="mixed")], *inner], currencies) if all(inner) else []
    return useful(found, currencies) if found else []


def _rotated(layer: int, matrices: Sequence[str], whole: Sequence[Sequence[Option]],
             alternatives: Sequence[Alternative], losses: Losses, spec: StackSpec, clock: Clock | None,
             currencies: Sequence[str], linked: bool) -> list[Option]:
    """Attention with its values rotated first, which costs nothing: v and o then lose what was measured after it.

    No other layer could then read its values.
    """
    rotation = next((item for item in alternatives if item.transform == "learn-rotation"), None)
    if rotation is None or not {"v", "o"} <= set(matrices) or not rotatable(spec.rows, layer):
        return []
    after = [replace(item, measured=f"output-error:{ROTATED} {item.label}") for item in alternatives
             if item.each and item.transform == "quantize"]
    row, kept = spec.rows[layer], [option for option in whole[matrices.index("v")] if not option.edits]
    o = _options(layer, "o", after, losses, spec, clock, row)
    v = [*kept, *_options(layer, "v", after, losses, spec, clock, row)]
    if not o:
        return []
    edit = Edit(layer, "learn-rotation", rotation.arguments, 0.0)
    first = Option("mixed", (edit,), 0.0, dict.fromkeys(row_cost(row, spec, clock), 0.0), TURNED if linked else "")
    parts = [{"v": v, "o": o}.get(matrix, options) for matrix, options in zip(matrices, whole, strict=True)]
    return combined([[first], *parts], currencies) if all(parts) else []


def _changes(alternative: Alternative, part: str, row: LayerSpec) -> bool:
    """Whether it is about the shape of that half."""
    if alternative.transform == "drop":
        return bool(alternative.arguments["part"] == part and row.mixer and row.feed_forward)
    if alternative.transform == "narrow":
        return ("width" in alternative.arguments) == (part == "feed_forward")
    return alternative.transform in KEYS and part == "attention"


def _keys(before: LayerSpec, after: LayerSpec) -> str:
    """What a changed layer does about keys, as `Option.keys` says it."""
    old, new = before.mixer, after.mixer
    if not isinstance(old, Attention) or not isinstance(new, Attention):
        return "none"
    if new.shares is not None:
        return str(new.shares)
    return "" if (new.kv_heads, new.head_dim) == (old.kv_heads, old.head_dim) else "none"


def _mixture(layer: int, row: LayerSpec, option: Option, base: Cost, hidden: int) -> Choice:
    edits = merged_edits(option.edits)
    edited: LayerSpec | None = row
    for edit in edits:
        assert edited is not None
        edited = edited_row(edited, hidden, edit.transform, edit.arguments)
    label = option.label if option.label != "mixed" else "; ".join(map(str, edits))
    cost = {name: value + option.cost[name] for name, value in base.items()}
    return Choice(layer, label, edits, edited, option.loss, cost, row)


def _options(layer: int, matrix: str, alternatives: Sequence[Alternative], losses: Losses, spec: StackSpec,
             clock: Clock | None, row: LayerSpec) -> list[Option]:
    found = [_option(layer, alternative, (matrix,), losses, spec, clock, row) for alternative in alternatives
             if alternative.each or alternative.transform is None]
    return [option for option in found if option is not None]


def _option(layer: int, alternative: Alternative, matrices: tuple[str, ...], losses: Losses, spec: StackSpec,
            clock: Clock | None, row: LayerSpec) -> Option | None:
    """The alternative for one matrix of `row`, or without `matrices` for what it names; None where it cannot be."""
    before = row_cost(row, spec, clock)
    if alternative.transform is None:
        return Option("keep", (), 0.0, dict.fromkeys(before, 0.0))
    loss = losses.of_matrix(alternative, layer, matrices[0]) if matrices else losses.of(alternative, layer)
    if not math.isfinite(loss):
        return None
    try:
        edited = _edited(row, alternative, spec.hidden, matrices)
    except BadOption:
        return None
    edits, after = _edits(layer, alternative, loss, matrices), row_cost(edited, spec, clock)
    return Option(alternative.label, edits, loss, {name: after[name] - before[name] for name in before})


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


def _choice(target: Target, alternative: Alternative, row: LayerSpec | None, losses: Losses, cost: Cost,
            before: LayerSpec | None = None) -> Choice:
    loss = losses.of(alternative, target)
    return Choice(target, alternative.label, _edits(target, alternative, loss), row, loss, cost, before)


def _edited(row: LayerSpec, alternative: Alternative, hidden: int, matrices: tuple[str, ...] = ()) -> LayerSpec | None:
    """The row after all steps of the alternative, None where it is gone. Raises BadOption where it cannot be."""
    edited: LayerSpec | None = row
    for one in alternative.steps():
        if edited is not None:
            edited = edited_row(edited, hidden, one.transform, one.given(matrices))
    return edited


def _edits(target: Target, alternative: Alternative, loss: float, matrices: tuple[str, ...] = ()) -> tuple[Edit, ...]:
    """One for each step; what is lost is written on the first."""
    return tuple(Edit(target, one.transform, one.given(matrices), 0.0 if place else loss)
                 for place, one in enumerate(alternative.steps()) if one.transform)


def _known(choices: list[Choice], what: str) -> list[Choice]:
    known = [choice for choice in choices if math.isfinite(choice.loss)]
    if not known:
        raise BadOption(f"no alternative with a known loss for {what}", expected="at least one",
                        do="add keep() to the alternatives, or measure the ones that are there")
    return known
