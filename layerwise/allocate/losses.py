"""How much an alternative is predicted to cost in quality: measured where it was tried, else a surrogate.

Measured losses are nats per token, from columns that tried the alternative on the model; one below zero
counts as zero, since a sample of text cannot show that less of a model is more. Without any measured
column, one or more importance columns stand in: loss(layer, alternative) = importance(layer) *
distortion(alternative), which only orders choices. The distortion of b bits is 4^-b, since each bit halves
the rounding step and so quarters the noise power; taking the whole layer away is 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from layerwise.errors import BadOption
from layerwise.measure.scores import Column, Scores
from layerwise.spec import StackSpec, Tiers, parse_table_format
from layerwise.transform.share_kv import sources

Target = int | str
"""A layer by its place in depth, or what is outside: "embedding", "head", "rest"."""

DEPTH = frozenset({"block-influence", "leave-one-out"})
"""Columns that say what taking a whole layer away does."""


INSTEAD = {"leave-one-out": "response:drop", "leave-one-out:attention": "response:drop attention",
           "leave-one-out:feed_forward": "response:drop feed-forward"}
"""Columns that measure the same as a divergence, which adds up with what other alternatives lose."""


@dataclass(frozen=True)
class Alternative:
    """One thing a layer could be: a transform with its arguments, or kept as it is (`transform` None).

    `measured` names the column that tried it. `distortion` ranks it among alternatives where nothing was
    measured, relative to taking the layer away. `tables` says whether embedding and head may have it too, `each`
    whether every matrix may have it by itself. What it leaves may be changed further by `then`, whose loss is added.
    """

    label: str
    transform: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    measured: str | None = None
    distortion: float = 0.0
    tables: bool = False
    each: bool = False
    then: Alternative | None = None

    def steps(self) -> list[Alternative]:
        """It and what comes then, in order."""
        return [self, *(self.then.steps() if self.then else [])]

    def given(self, matrices: tuple[str, ...]) -> dict[str, Any]:
        """The arguments of its transform, for some matrices only unless there are none."""
        return {**self.arguments, **({"matrices": matrices} if matrices else {})}

    def at(self, layer: int, spec: StackSpec) -> Alternative | None:
        """The same for one layer: what reads keys of the n-th nearest layer says of which; None without such a one."""
        if "nearest" not in self.arguments:
            return self
        found, place = sources(spec, layer), self.arguments["nearest"] - 1
        return replace(self, arguments={"source": found[place]}) if place < len(found) else None


@dataclass(frozen=True)
class Losses:
    """Predicted losses read from `columns` of `scores`; `unit` says whether they are measured."""

    scores: Scores
    columns: tuple[str, ...]
    measured: bool

    @property
    def unit(self) -> str:
        return "nats/token" if self.measured else "relative"

    def of(self, alternative: Alternative, target: Target) -> float:
        """The predicted loss of giving `target` the `alternative`; nan where it is not known."""
        if alternative.transform is None:
            return 0.0
        if self.measured:
            found = [_measured(self.scores, one, target) for one in alternative.steps()]
            return sum(loss if math.isnan(loss) else max(loss, 0.0) for loss in found)
        return self._importance(target) * alternative.distortion

    def of_matrix(self, alternative: Alternative, layer: int, matrix: str) -> float:
        """The predicted loss of one matrix of `layer` alone; nan where it is not known."""
        if alternative.transform is None:
            return 0.0
        if not self.measured or alternative.measured is None:
            return math.nan
        name, _, setting = alternative.measured.partition(":")
        later = self.of_matrix(alternative.then, layer, matrix) if alternative.then else 0.0
        return _loss(self.scores, f"{name}:{matrix}:{setting}", layer) + later

    def floor(self, target: Target) -> float:
        """Losses up to this are no more than what rounding does; 0 where that was not measured."""
        measured = {name.partition(":")[0] for name in self.columns} if self.measured else set()
        floors = {f"{'response' if name == 'output-error' else name}:floor" for name in measured}
        known = [_value(self.scores[name], target) for name in sorted(floors) if name in self.scores]
        return max((value for value in known if not math.isnan(value)), default=0.0)

    def _importance(self, target: Target) -> float:
        """The mean over columns, from 0 to 1; what is not a layer counts as the most important."""
        if isinstance(target, str):
            return 1.0
        alone = len(self.columns) == 1
        parts = [importance(self.scores[name], ratio=alone)[target] for name in self.columns]
        return math.fsum(parts) / len(parts)


def predict(scores: Scores, alternatives: Sequence[Alternative], by: str | Sequence[str] | None) -> Losses:
    """Where losses come from: the measured columns if `by` is None and there are any, else importance.

    `by` names the importance columns to use. Raises UnknownName for a column that is not in the scores and
    BadOption where no column says what matters.
    """
    if by is None:
        tried = [name for alternative in alternatives for name in tried_columns(scores, alternative)]
        if tried:
            return Losses(scores, tuple(dict.fromkeys(tried)), measured=True)
        names = [name for name, column in scores.columns.items() if column.important]
    else:
        names = [by] if isinstance(by, str) else list(by)
    if not names or any(scores[name].important is None for name in names):
        raise BadOption(f"planning by the columns {names or list(scores.columns)}",
                        expected="a column that says which layers are important",
                        do='measure one first, such as "block-influence" or "quantization-sensitivity"')
    return Losses(scores, tuple(names), measured=False)


def tried_columns(scores: Scores, alternative: Alternative) -> list[str]:
    """The columns in which the loss of `alternative` was measured: for whole layers, else per matrix."""
    if alternative.measured is None:
        return []
    for name in (INSTEAD.get(alternative.measured, ""), alternative.measured):
        if name in scores:
            return [name]
    return [name for name in _per_matrix(scores, alternative.measured).values() if name in scores]


def importance(column: Column, ratio: bool) -> list[float]:
    """Layers from 0 to 1, 1 the most important, unmeasured ones included.

    With `ratio`, high-is-important columns without negative values keep their proportions (value / largest);
    every other column becomes the rank in order of importance, from 1 / layers to 1.
    """
    values, layers = column.values, len(column.values)
    largest = max((value for value in values if not math.isnan(value)), default=0.0)
    proportional = column.important == "high" and 0 < largest < math.inf and not any(v < 0 for v in values)
    if ratio and proportional:
        return [1.0 if math.isnan(value) else value / largest for value in values]
    ranks = [0.0] * layers
    for place, layer in enumerate(column.ranking(), start=1):
        ranks[layer] = place / layers
    return ranks


def _measured(scores: Scores, alternative: Alternative, target: Target) -> float:
    names = tried_columns(scores, alternative)
    if isinstance(target, str) and (alternative.measured or "").startswith("output-error:"):
        setting = (alternative.measured or "").partition(":")[2]
        tried, left = f"response:{setting}", f"output-error:table:{_mostly(setting)}"
        part = scores[left].outside.get(target, 1.0) if left in scores else 1.0
        return part * _value(scores[tried], target) if tried in scores else math.nan
    if alternative.measured is None or not names:
        return math.nan
    if isinstance(target, int) and names == [alternative.measured] and names[0].count(":") == 2:
        return _loss(scores, names[0], target)
    if len(names) == 1 and names[0] in (alternative.measured, INSTEAD.get(alternative.measured)):
        return _value(scores[names[0]], target)
    if isinstance(target, str):
        return math.nan
    parts = _per_matrix(scores, alternative.measured)
    matrices = scores.spec.rows[target].matrices(scores.spec.hidden)
    return sum(_loss(scores, parts[matrix], target) for matrix in matrices)


def _mostly(label: str) -> str:
    """The format in which most rows of a table are."""
    format = parse_table_format(label)
    return format.rare.label if isinstance(format, Tiers) else label


def _loss(scores: Scores, column: str, layer: int) -> float:
    """The loss of one matrix from a column that holds it, or from one of output errors; nan where it is not known."""
    if column not in scores:
        return math.nan
    value = scores[column].values[layer]
    name, matrix, _ = column.split(":", 2)
    if name != "output-error":
        return value
    response, probe = f"response:{matrix}", f"output-error:{matrix}:probe"
    if response not in scores or probe not in scores:
        return math.nan
    return scores[response].values[layer] * value / scores[probe].values[layer]


def _value(column: Column, target: Target) -> float:
    return column.outside.get(target, math.nan) if isinstance(target, str) else column.values[target]


def _per_matrix(scores: Scores, column: str) -> dict[str, str]:
    """`quantization-sensitivity:4` was measured matrix by matrix as `quantization-sensitivity:q:4`."""
    name, _, setting = column.partition(":")
    matrices = {matrix for row in scores.spec.rows for matrix in row.matrices(scores.spec.hidden)}
    return {matrix: f"{name}:{matrix}:{setting}" for matrix in sorted(matrices)}
