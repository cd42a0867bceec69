"""Plan, carry out, measure, correct, plan again: until what a plan was predicted to lose is what it loses.

Losses that were measured one at a time leave out how edits act on one another. After each round the responses
are scaled, layer by layer, so that the prediction is right at the plan just measured (see `marginal.py`), and
the next plan is made with them. It ends when the prediction was within TOLERANCE of the measurement, when the
plan did not change, when a round came out no better than the best, or after `rounds` rounds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from layerwise.allocate.apply import apply
from layerwise.allocate.plan import Plan
from layerwise.data.text import TextData
from layerwise.measure.marginal import Marginals, divergence, marginals
from layerwise.measure.scores import Column, Scores
from layerwise.report.layers import kept_layers
from layerwise.stack.decoder import DecoderStack

ROUNDS = 3
TOLERANCE = 0.1
"""Relative difference of predicted and measured loss at which they agree."""

SHORT = 256
"""Tokens of a block on which single changes are tried, or undone; whole plans are measured on all of it."""

STEP = 4.0
"""A prediction is corrected by at most this factor in one round."""

ADDS_UP = ("quantize", "learn-rotation")
OF_RESPONSES = {"drop": "drop", "share": "share-kv", "cache": "cache-precision"}
"""The kinds of edit that have responses of their own; all other responses are those of matrices and tables."""


@dataclass(frozen=True)
class Round:
    """One plan with the loss it was predicted to have and the one it was measured to have, nats per token.

    `floor` is what rounding alone does to the predictions of the original, and part of what is measured.
    """

    plan: Plan
    bytes: int
    predicted: float
    measured: float
    floor: float = 0.0

    @property
    def agrees(self) -> bool:
        return abs(self.predicted + self.floor - self.measured) <= max(TOLERANCE * self.measured, self.floor)


def refine(stack: DecoderStack, scores: Scores, decide: Callable[[Scores], Plan], calibration: TextData,
           trial: TextData, *, rounds: int = ROUNDS, seed: int = 0, tell: Callable[[str], None] = lambda _: None,
           progress: bool = False) -> list[Round]:
    """The rounds in order; the one with the smallest measured loss is the plan to take.

    `decide` makes a plan from scores; `calibration` is what transforms read, `trial` what losses are measured
    on. Raises what planning and applying raise.
    """
    found: list[Round] = []
    floor = scores["response:floor"].values[0] if "response:floor" in scores else 0.0
    for number in range(1, rounds + 1):
        plan = decide(scores)
        if any(plan.edits == earlier.plan.edits for earlier in found):
            break
        slim = apply(stack, plan, calibration)
        measured = divergence(stack, slim, trial, seed=seed)
        found.append(Round(plan, slim.spec.bytes(), plan.predicted["loss"], measured, floor))
        tell(f"round {number}: predicted {found[-1].predicted + floor:.4f}, measured {measured:.4f} nats/token")
        last = number == rounds or found[-1].agrees
        if last or measured > min(earlier.measured for earlier in found):
            break
        scores = corrected(scores, plan, undone(stack, slim, plan, trial, measured, seed, progress), floor)
        del slim  # or two edited models are in memory while the next is made
    return found


def shortened(trial: TextData) -> TextData:
    """The text on which single changes are tried."""
    return trial.shortened(SHORT) if isinstance(trial, TextData) else trial


def undone(stack: DecoderStack, slim: DecoderStack, plan: Plan, trial: TextData, measured: float, seed: int,
           progress: bool) -> Marginals:
    """What undoing each edit saves, on the text on which changes are tried, of what was `measured` on all of it."""
    kept = kept_layers(stack.spec, plan)
    found = marginals(stack, slim, kept, shortened(trial), seed=seed, progress=progress)
    return replace(found, kl=measured)


def corrected(scores: Scores, plan: Plan, seen: Marginals, floor: float = 0.0) -> Scores:
    """Scores that predict, for `plan`, the loss that was measured.

    First by kind of edit, since a kind may be worse than its errors say everywhere: the factors that explain best
    what undoing each layer saves. What is then missing is charged to the layers and tables that undoing shows to be
    worse than predicted, by more than the floor, in proportion; to all, where none is. The others stay as predicted:
    what undoing saves is measured on little text, and what looks free there would be chosen next. Where less was lost
    than predicted, the same the other way round. In a layer that has fewer parts or ranks as well as formats the
    former are charged: what formats lose adds up.
    """
    kinds = _predicted(plan)
    saved = {target: max(value, 0.0) for target, value in seen.saved.items() if sum(kinds.get(target, {}).values())}
    alone = sum(sum(kinds[target].values()) for target in saved)
    left = seen.kl - floor - sum(sum(losses.values()) for target, losses in kinds.items() if target not in saved)
    if not sum(saved.values()) or left <= 0:
        return scores
    by_kind = {kind: max(factor, 1.0) if left >= alone else min(factor, 1.0) for kind, factor in _by_kind(
        {target: kinds[target] for target in saved if isinstance(target, int)}, saved).items()}
    expected = {target: {kind: loss * (by_kind.get(kind, 1.0) if isinstance(target, int) else 1.0)
                         for kind, loss in kinds[target].items()} for target in saved}
    sums = {target: sum(losses.values()) for target, losses in expected.items()}
    missing = left - sum(sums.values())
    sign = math.copysign(1.0, missing)
    apart = {target: max(sign * (value - sums[target]) - floor, 0.0) for target, value in saved.items()}
    if not sum(apart.values()):
        apart = sums
    part = missing / sum(apart.values())
    factors: dict[int | str, dict[str, float]] = {}
    for target, losses in expected.items():
        charged = {kind: loss for kind, loss in losses.items() if kind not in ADDS_UP and loss > 0} or losses
        factor = min(max(1 + part * apart[target] / sum(charged.values()), 1 / STEP), STEP)
        factors[target] = dict.fromkeys(charged, factor)
    return replace(scores, columns={name: _charged(column, by_kind, factors)
                                    for name, column in scores.columns.items()})


def _predicted(plan: Plan) -> dict[int | str, dict[str, float]]:
    """Predicted losses by target and kind of edit."""
    losses: dict[int | str, dict[str, float]] = {}
    for edit in plan.edits:
        found = losses.setdefault(edit.target, {})
        found[edit.transform] = found.get(edit.transform, 0.0) + (edit.predicted_loss or 0.0)
    return losses


def _by_kind(predicted: Mapping[int | str, Mapping[str, float]], saved: Mapping[int | str, float]) -> dict[str, float]:
    """The factor of each kind, by least squares without negative ones; between 1 / STEP and STEP^2."""
    from scipy.optimize import nnls

    kinds = sorted({kind for losses in predicted.values() for kind, loss in losses.items() if loss > 0})
    if len(kinds) < 2 or len(predicted) < 2 * len(kinds):
        return {}
    table = np.array([[losses.get(kind, 0.0) for kind in kinds] for losses in predicted.values()])
    found, _ = nnls(table, np.array([saved[target] for target in predicted]))
    return {kind: float(np.clip(factor, 1 / STEP, STEP**2)) for kind, factor in zip(kinds, found, strict=True)}


def _charged(column: Column, by_kind: Mapping[str, float], factors: Mapping[int | str, Mapping[str, float]]) -> Column:
    """A column with what its kind of edit is charged everywhere, and what each layer and table is charged for.

    What formats of a layer are charged stands in its responses, which all edits of its matrices are predicted from, so
    it is taken off the errors of others.
    """
    name, _, setting = column.name.partition(":")
    part = setting.partition(":")[2]
    if name == "response" and setting != "floor":
        kind = OF_RESPONSES.get(setting.partition(" ")[0], "quantize")
        everywhere, beside = 1.0 if kind == "quantize" else by_kind.get(kind, 1.0), ""
    elif name == "output-error" and part != "probe" and not setting.startswith("table:"):
        kind = {"rank": "low-rank", "width": "narrow"}.get(part.partition(" ")[0], "quantize")
        everywhere, beside = by_kind.get(kind, 1.0), "quantize"
    else:
        return column

    def factor(target: int | str) -> float:
        charged = factors.get(target, {})
        return charged.get(kind, 1.0) / charged.get(beside, 1.0)

    values = tuple(value * everywhere * factor(layer) for layer, value in enumerate(column.values))
    return replace(column, values=values, outside={place: value * factor(place)
                                                   for place, value in column.outside.items()})
