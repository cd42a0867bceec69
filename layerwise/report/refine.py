"""Plan, carry out, measure, correct, plan again: until what a plan was predicted to lose is what it loses.

Losses that were measured one at a time leave out how edits act on one another. After each round the responses
are scaled, layer by layer, so that the prediction is right at the plan just measured (see `marginal.py`), and
the next plan is made with them. It ends when the prediction was within TOLERANCE of the measurement, when the
plan did not change, when a round came out no better than the best, or after `rounds` rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from layerwise.allocate.apply import apply
from layerwise.allocate.plan import Plan
from layerwise.data.text import TextData
from layerwise.measure.marginal import Marginals, marginals
from layerwise.measure.scores import Column, Scores
from layerwise.report.layers import kept_layers
from layerwise.stack.decoder import DecoderStack

ROUNDS = 3
TOLERANCE = 0.1
"""Relative difference of predicted and measured loss at which they agree."""

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
        seen = marginals(stack, slim, kept_layers(stack.spec, plan), trial, seed=seed, progress=progress)
        found.append(Round(plan, slim.spec.bytes(), plan.predicted["loss"], seen.kl, floor))
        tell(f"round {number}: predicted {found[-1].predicted + floor:.4f}, measured {seen.kl:.4f} nats/token")
        if found[-1].agrees or seen.kl > min(earlier.measured for earlier in found):
            break
        scores = corrected(scores, plan, seen, floor)
    return found


def corrected(scores: Scores, plan: Plan, seen: Marginals, floor: float = 0.0) -> Scores:
    """Scores whose responses predict, for `plan`, the loss that was measured, shared out as undoing shows.

    What undoing one edit saves is known to within the floor; where edits lose less than that, their shares stay
    nearly as they were predicted.
    """
    predicted = _predicted(plan)
    saved = {target: predicted[target] * (max(value, 0.0) + floor) / (predicted[target] + floor)
             for target, value in seen.saved.items() if predicted.get(target)}
    others = sum(loss for target, loss in predicted.items() if target not in saved)
    total, left = sum(saved.values()), seen.kl - floor - others
    if not total or left <= 0:
        return scores
    factors = {target: min(max(left * value / total / predicted[target], 1 / STEP), STEP)
               for target, value in saved.items()}
    columns = {name: _scaled(column, factors) if name.startswith("response:") else column
               for name, column in scores.columns.items()}
    return replace(scores, columns=columns)


def _predicted(plan: Plan) -> dict[int | str, float]:
    losses: dict[int | str, float] = {}
    for edit in plan.edits:
        losses[edit.target] = losses.get(edit.target, 0.0) + (edit.predicted_loss or 0.0)
    return losses


def _scaled(column: Column, factors: Mapping[int | str, float]) -> Column:
    if column.name.endswith(":floor"):
        return column
    values = tuple(value * factors.get(layer, 1.0) for layer, value in enumerate(column.values))
    outside = {place: value * factors.get(place, 1.0) for place, value in column.outside.items()}
    return replace(column, values=values, outside=outside)
