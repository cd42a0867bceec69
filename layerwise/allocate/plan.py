"""`Plan`: the chosen edits and where they came from, in a file that people can read and change."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from layerwise.allocate.budget import show
from layerwise.allocate.edits import edited_row, edited_table
from layerwise.allocate.losses import Target
from layerwise.errors import BadOption, BadPlan, LayerwiseError, UnknownName
from layerwise.io import atomic
from layerwise.spec import Format, LayerSpec, StackSpec, tiers_label

FORMAT = "layerwise-plan-1"


@dataclass(frozen=True)
class Edit:
    """One transform for one target: a layer of the original, "embedding" or "head"."""

    target: Target
    transform: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    predicted_loss: float | None = None

    def __post_init__(self) -> None:
        plain = {name: list(value) if isinstance(value, tuple) else value
                 for name, value in self.arguments.items()}
        object.__setattr__(self, "arguments", plain)

    def __str__(self) -> str:
        if self.transform == "quantize" and {"bits", "group", "symmetric"} <= set(self.arguments):
            with suppress(BadOption, TypeError):  # an edit by hand is shown as it stands, whatever it says
                label = Format(*(self.arguments[name] for name in ("bits", "group", "symmetric"))).label
                if self.arguments.get("frequent"):
                    label = tiers_label(self.arguments["frequent"], self.arguments["frequent_rows"], label)
                return f"{label} {' '.join(self.arguments.get('matrices') or ())}".rstrip()
        settings = ", ".join(f"{name}={value}" for name, value in self.arguments.items())
        return f"{self.transform} {settings}".rstrip()

    def brief(self) -> str:
        """A few words: `4 bits`, `drop layer`."""
        if "bits" in self.arguments:
            return f"{self.arguments['bits']} bits{' for rare tokens' if self.arguments.get('frequent') else ''}"
        settings = (value for name, value in self.arguments.items() if name != "matrices")
        return " ".join([self.transform, *map(str, settings)])


@dataclass(frozen=True)
class Plan:
    """Edits to the layers of one model; layers without an edit are kept.

    `table` is the fingerprint of the layer table the plan is for, `model` that of its weights ("" if
    unknown), `layers` the number of layers. `predicted` holds the total of each cost and "loss", in
    `loss_unit`. The rest records where the plan came from: the budget as given, the limits it meant, the
    solver with its settings, the columns it read and their provenance.
    """

    table: str
    layers: int
    edits: tuple[Edit, ...]
    model: str = ""
    budget: Mapping[str, Any] = field(default_factory=dict)
    limits: Mapping[str, float] = field(default_factory=dict)
    solver: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    predicted: Mapping[str, float] = field(default_factory=dict)
    loss_unit: str = ""
    columns: tuple[str, ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    def edited(self, spec: StackSpec) -> StackSpec:
        """The table after all edits. Raises BadPlan where the plan is for another model or cannot be made."""
        if self.table != spec.fingerprint():
            raise BadPlan(f"a plan for the model with table {self.table} and {self.layers} layers",
                          expected=f"one for table {spec.fingerprint()} with {len(spec.rows)} layers",
                          do="make a plan for this model")
        rows: dict[int, LayerSpec | None] = dict(enumerate(spec.rows))
        for place, edit in enumerate(self.edits):
            try:
                if isinstance(edit.target, str):
                    spec = edited_table(spec, edit.target, edit.transform, edit.arguments)
                else:
                    rows[edit.target] = _edited(rows, edit, spec.hidden)
            except (BadOption, UnknownName, TypeError) as error:
                raise _bad_edit(place, edit, error) from error
        try:
            return spec.with_rows(rows)
        except BadOption as error:
            raise BadPlan(f"a plan that leaves {error.given}", expected=error.expected, do=error.do) from error

    def of(self, target: Target) -> list[Edit]:
        """The edits of one target, in order."""
        return [edit for edit in self.edits if edit.target == target]

    def diff(self, other: Plan) -> list[str]:
        """What differs, one line per target or setting: `layer 3: quantize bits=4 -> drop part=layer`."""
        lines = [f"{name}: {ours} -> {theirs}" for name in ("table", "budget", "solver", "seed")
                 if (ours := getattr(self, name)) != (theirs := getattr(other, name))]
        targets = dict.fromkeys(edit.target for edit in (*self.edits, *other.edits))
        for target in sorted(targets, key=lambda target: (isinstance(target, str), target)):
            ours, theirs = _what(self.of(target)), _what(other.of(target))
            if ours != theirs:
                lines.append(f"{_name(target)}: {ours} -> {theirs}")
        return lines

    # views -------------------------------------------------------------------------------------

    def describe(self) -> str:
        """One line: how many layers get what, and what that is predicted to cost."""
        kinds = Counter(self._brief(layer) for layer in range(self.layers))
        parts = [f"{kind} for {count} of {self.layers} layers" for kind, count in kinds.most_common()]
        parts += [f"{self._brief(target)} for the {target}" for target in self._tables()]
        return "; ".join([", ".join(parts), *self._totals()])

    def _brief(self, target: Target) -> str:
        return _brief(self.of(target))

    def _tables(self) -> list[str]:
        return [target for target in ("embedding", "head") if self.of(target)]

    def _totals(self) -> list[str]:
        costs = [show(name, value) for name, value in self.predicted.items() if name in self.budget]
        if "loss" in self.predicted:
            costs.append(f"predicted loss {self.predicted['loss']:.4g} {self.loss_unit}")
        return [", ".join(costs)] if costs else []

    def __str__(self) -> str:
        """A table, one line for a run of layers that get the same."""
        budget = ", ".join(f"{name} {value}" for name, value in self.budget.items())
        lines = [f"plan for {self.layers} layers: {budget or 'no budget'} ({self.solver or 'by hand'})"]
        runs = itertools.groupby(range(self.layers), key=lambda layer: _what(self.of(layer)))
        for what, run in runs:
            layers = list(run)
            span = f"{layers[0]}" if len(layers) == 1 else f"{layers[0]}-{layers[-1]}"
            lines.append(self._line(span, what, [edit for layer in layers for edit in self.of(layer)]))
        lines += [self._line(target, _what(self.of(target)), self.of(target)) for target in self._tables()]
        return "\n".join([*lines, *(f"  total: {total}" for total in self._totals())])

    def _line(self, span: str, what: str, edits: list[Edit]) -> str:
        losses = [edit.predicted_loss for edit in edits if edit.predicted_loss is not None]
        return f"  {span:>9}  {what:<44}{sum(losses):10.4g}".rstrip() if losses else f"  {span:>9}  {what}"

    # files -------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> Path:
        """Write JSON, one line per edit. Raises BadFile, with nothing changed, where it cannot."""
        value = self.to_json()
        edits = ",\n".join("  " + json.dumps(edit) for edit in value.pop("edits"))
        head = json.dumps(value, indent=1, allow_nan=False)
        return atomic.write_text(path, f'{head[:-2]},\n "edits": [\n{edits}\n ]\n}}\n')

    @staticmethod
    def load(path: str | Path) -> Plan:
        """Read what `save` wrote or a person changed. Raises BadPlan, saying what is wrong."""
        try:
            value = json.loads(Path(path).read_text())
        except (OSError, ValueError) as error:
            raise BadPlan(f"a plan in {path}: {error}", expected="JSON written by Plan.save",
                          do="repair the file or make a new plan") from error
        return Plan.from_json(value)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        value = {"format": FORMAT, **vars(self), "columns": list(self.columns)}
        return value | {"edits": [dict(vars(edit)) for edit in self.edits]}

    @staticmethod
    def from_json(value: Any) -> Plan:
        """The inverse of `to_json`. Raises BadPlan on anything that is not a plan."""
        if not isinstance(value, dict) or value.get("format") != FORMAT:
            raise BadPlan("a file that is not a plan", expected=f'JSON with "format": "{FORMAT}"',
                          do="point to a file written by Plan.save")
        try:
            edits = tuple(Edit(**edit) for edit in value["edits"])
            rest = {name: item for name, item in value.items() if name not in ("format", "edits", "columns")}
            plan = Plan(edits=edits, columns=tuple(value.get("columns", ())), **rest)
        except (KeyError, TypeError, AttributeError) as error:
            raise BadPlan(f"a plan with missing or unknown keys: {error}", expected="what Plan.save writes",
                          do="repair the file or make a new plan") from error
        if not isinstance(plan.layers, int) or not isinstance(plan.table, str):
            raise BadPlan(f"a plan for the table {plan.table!r} with {plan.layers!r} layers",
                          expected="a fingerprint and a number", do="repair the file or make a new plan")
        for place, edit in enumerate(plan.edits):
            _check(place, edit, plan.layers)
        return plan

    def with_edits(self, *edits: Edit) -> Plan:
        """A copy in which the targets of `edits` get these and nothing else; predictions are dropped."""
        targets = {edit.target for edit in edits}
        kept = (edit for edit in self.edits if edit.target not in targets)
        return replace(self, edits=(*kept, *edits), predicted={})


def _edited(rows: Mapping[int, LayerSpec | None], edit: Edit, hidden: int) -> LayerSpec | None:
    assert isinstance(edit.target, int)
    row = rows[edit.target]
    if row is None:
        raise BadOption("an edit of a layer that an earlier edit took away", expected="one or the other",
                        do="remove one of the two edits")
    return edited_row(row, hidden, edit.transform, edit.arguments)


def _check(place: int, edit: Edit, layers: int) -> None:
    from layerwise.transform import TRANSFORMS

    if isinstance(edit.target, str):
        known = edit.target in ("embedding", "head")
    else:
        known = isinstance(edit.target, int) and 0 <= edit.target < layers
    if not known:
        raise _bad_edit(place, edit, BadOption(f"no layer {edit.target}", do="correct its target",
                                               expected=f'0 to {layers - 1}, "embedding" or "head"'))
    try:
        TRANSFORMS[edit.transform](**edit.arguments)
    except (BadOption, UnknownName, TypeError) as error:
        raise _bad_edit(place, edit, error) from error


def _bad_edit(place: int, edit: Edit, error: Exception) -> BadPlan:
    given, expected, how = ((error.given, error.expected, f": {error.do}") if isinstance(error, LayerwiseError)
                            else (str(error), "an edit this model can have", ""))
    return BadPlan(f"edit {place} of the plan, {edit} for {_name(edit.target)}: {given}",
                   expected=expected, do=f"remove this edit, or change it{how}")


def _what(edits: list[Edit]) -> str:
    return ", then ".join(str(edit) for edit in edits) or "keep"


def _brief(edits: list[Edit]) -> str:
    """Few words for all edits of a target; of formats only the widths: `drop attention, 3 to 6 bits`."""
    widths = sorted({edit.arguments["bits"] for edit in edits if "bits" in edit.arguments})
    words = list(dict.fromkeys(edit.brief() for edit in edits if "bits" not in edit.arguments))
    if widths:
        words.append(f"{widths[0]} bits" if len(widths) == 1 else f"{widths[0]} to {widths[-1]} bits")
    return ", ".join(words) or "keep"


def _name(target: Target) -> str:
    return f"layer {target}" if isinstance(target, int) else target
