"""Plan, carry out, measure, correct, plan again: until what a plan was predicted to lose is what it loses.

Losses that were measured one at a time leave out how edits act on one another. After each round the responses
are scaled, layer by layer, so that the prediction is right at the plan just measured (see `marginal.py`), and
the next plan is made with them. It ends when the prediction of a corrected plan was within TOLERANCE of the measurement
(that of a first one may be right in sum and wrong in its parts), when only as much is lost as rounding does, when the
plan did not change, when a round came out no better than the best, or after `rounds` rounds.
"""

from __future__ import annotations

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
"""A response is corrected by at most this factor in one round."""


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
    def settled(self) -> bool:
        """Whether what edits lose, beside what rounding does, is no more than that."""
        return self.measured <= 2 * self.floor

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
    floor = floor_of(scores)
    for number in range(1, rounds + 1):
        plan = decide(scores)
        if any(plan.edits == earlier.plan.edits for earlier in found):
            break
        slim = apply(stack, plan, calibration)
        measured = divergence(stack, slim, trial, seed=seed)
        found.append(Round(plan, slim.spec.bytes(), plan.predicted["loss"], measured, floor))
        tell(f"round {number}: predicted {found[-1].predicted + floor:.4f}, measured {measured:.4f} nats/token")
        last = number == rounds or found[-1].settled or (number > 1 and found[-1].agrees)
        if last or measured > min(earlier.measured for earlier in found):
            break
        scores = corrected(scores, plan, undone(stack, slim, plan, trial, measured, seed, progress), floor)
        del slim  # or two edited models are in memory while the next is made
    return found


def floor_of(scores: Scores) -> float:
    """What rounding alone does to the predictions of the original, nats per token; 0 where it was not measured."""
    return scores["response:floor"].values[0] if "response:floor" in scores else 0.0


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
    """Scores that predict, for `plan`, the loss that was measured, shared out as undoing shows.

    First by kind of edit, since a kind may be worse than its errors say everywhere: the factors that explain best
    what undoing each layer saves. Then by layer and table, as far as it can be known: what undoing saves is
    measured to within the floor, so that where edits lose less than that their shares stay as predicted.
    """
    kinds = _predicted(plan)
    saved = {target: max(value, 0.0) for target, value in seen.saved.items() if sum(kinds.get(target, {}).values())}
    left = seen.kl - floor - sum(sum(losses.values()) for target, losses in kinds.items() if target not in saved)
    if not sum(saved.values()) or left <= 0:
        return scores
    by_kind = _by_kind({target: kinds[target] for target in saved if isinstance(target, int)}, saved)
    expected = {target: sum(loss * (by_kind.get(kind, 1.0) if isinstance(target, int) else 1.0)
                            for kind, loss in kinds[target].items()) for target in saved}
    shares = {target: expected[target] * (value + floor) / (expected[target] + floor)
              for target, value in saved.items()}
    level = left / sum(shares.values())
    factors = {target: min(max(level * share / expected[target], 1 / STEP), STEP) for target, share in shares.items()}
    columns = {name: _of_kind(_scaled(column, factors), by_kind) for name, column in scores.columns.items()}
    return replace(scores, columns=columns)


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


def _of_kind(column: Column, factors: Mapping[str, float]) -> Column:
    """A column of errors or of parts left out, with the factor of the transform that it is about."""
    name, _, setting = column.name.partition(":")
    what = setting.partition(":")[2]
    kind = "quantize"
    if name == "response":
        kind = {"drop": "drop", "share": "share-kv", "cache": "cache-precision"}.get(setting.partition(" ")[0], "")
    elif name != "output-error" or what == "probe" or setting.startswith("table:"):
        kind = ""
    elif what.startswith(("rank ", "width ")):
        kind = "low-rank" if what.startswith("rank ") else "narrow"
    factor = factors.get(kind, 1.0)
    return column if factor == 1.0 else replace(column, values=tuple(value * factor for value in column.values))


def _scaled(column: Column, factors: Mapping[int | str, float]) -> Column:
    if not column.name.startswith("response:") or column.name.endswith(":floor"):
        return column
    values = tuple(value * factors.get(layer, 1.0) for layer, value in enumerate(column.values))
    outside = {place: value * factors.get(place, 1.0) for place, value in column.outside.items()}
    return replace(column, values=values, outside=outside)
