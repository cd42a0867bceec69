"""Early stopping: a part whose absence is clearly too bad for any plan is not measured on all blocks.

A divergence is never negative, so a mean over all blocks is at least the sum over those that were read, divided by the
positions of all. This bound is certain, whatever the blocks still unread say. Nor does the best plan hold a choice
that alone loses more than some plan within the budget loses in all. Together:

    stopped where   sum of KL so far / positions of all blocks - floor  >  loss of the plan that would be chosen

in nats per token, the floor as in `measure/floor.py` (and the left side above the floor itself). The plan on the right
is solved again with all that was measured, and whatever it no longer rules out is measured to the end, until it rules
out everything that was stopped. A solver that is exact therefore finds the plan that it finds without stopping, as far
as fronts of mixtures are not thinned (see `mixtures.py`). What was stopped stands in the column with its mean so far.

Only parts left out are stopped, keys and values of a layer's own among them. Disturbed matrices are factors in the
losses of milder alternatives, and tables lose less than was tried where they are rounded better; both say nothing by
being large.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from layerwise.allocate.plan import Plan
from layerwise.data.text import TextData
from layerwise.errors import BadOption
from layerwise.measure.base import Intervention, Trial
from layerwise.measure.engine import measure
from layerwise.measure.floor import above, floor_of
from layerwise.measure.inputs import Inputs, fingerprint
from layerwise.measure.response import DROPS, SHARES, Response
from layerwise.measure.sample import predicted
from layerwise.measure.scores import Column, Scores
from layerwise.stack.base import Stack

LEAST = 2
"""Blocks of text on which everything is tried."""

Values = dict[Trial, float]


def measure_early(stack: Stack, data: TextData, response: Response, decide: Callable[[Scores], Plan], *,
                  blocks: int = LEAST, seed: int = 0, progress: bool = True,
                  resume: str | Path | None = None) -> Scores:
    """The columns of `response`, with parts left out stopped after `blocks` blocks where no plan can want them.

    `decide` makes the plan that would be chosen, from these columns and what it has beside them. What was stopped is
    recorded under "stopped" in the provenance of the scores, and so in that of every plan made from them: by trial
    ("0/drop") the blocks it was measured on, of how many, its mean so far, the bound on its loss and the loss of the
    plan that ruled it out. With `resume`, finished trials are kept in that file. Raises BadOption for fewer than LEAST
    blocks, and what measuring and `decide` raise.
    """
    if blocks < LEAST:
        raise BadOption(f"blocks={blocks}", expected=f"at least {LEAST}", do="try everything on more blocks")

    def tried(text: TextData, without: Sequence[str] = ()) -> Scores:
        parts = {field.name: getattr(response, field.name) for field in dataclasses.fields(response)}
        return measure(stack, text, _Raw(**parts, without=tuple(without)), seed=seed, progress=progress, resume=resume)

    sample, tokens = fingerprint(Inputs(stack, data))
    first, rest = data.take(blocks), data.skip(blocks)
    scores = tried(first)
    about = {**scores.provenance, "sample": sample, "tokens": tokens, "instruments": [response.to_json()]}
    scores = replace(scores, provenance=about)
    early = _values(scores)
    if not len(rest):
        return _joined(response, scores, early)
    share = _positions(first, response.tokens) / _positions(data, response.tokens)
    least = {trial: share * mean for trial, mean in early.items()}
    whole = Values()
    loss = decide(_joined(response, scores, early)).predicted["loss"]
    stopped = _hopeless(least, loss, len(stack))
    wanted = set(early) - set(stopped)
    while wanted:
        later = _values(tried(rest, [trial.key for trial in early if trial not in wanted]))
        whole |= {trial: least[trial] + (1 - share) * value for trial, value in later.items()}
        loss = decide(_joined(response, scores, early | whole)).predicted["loss"]
        ruled_out = _hopeless(least | whole, loss, len(stack))
        wanted = set(stopped) - set(ruled_out)
        stopped = {trial: ruled_out[trial] for trial in stopped if trial in ruled_out}
    return _joined(response, scores, early | whole, {
        trial.key: {"blocks": len(first), "of": len(data), "mean": early[trial], "bound": bound, "plan": loss}
        for trial, bound in stopped.items()})


def _hopeless(least: Mapping[Trial, float], loss: float, layers: int) -> dict[Trial, float]:
    """Parts left out that, less the floor, lose more than `loss` even where they lose the `least`, with that bound."""
    floor = floor_of(least, layers)
    return {trial: bound for trial, bound in above(least, floor).items()
            if trial.part in (*DROPS, *SHARES) and max(loss, floor.get(trial.place, 0.0)) < bound < math.inf}


def _joined(response: Response, first: Scores, values: Mapping[Trial, float],
            stopped: Mapping[str, Mapping[str, float]] | None = None) -> Scores:
    columns = {column.name: column for column in response.finish(len(first.spec.rows), values)}
    return replace(first, columns=columns, provenance={**first.provenance, "stopped": dict(stopped or {})})


def _values(scores: Scores) -> Values:
    """The score of every trial, out of raw columns."""
    found = Values()
    for name, column in scores.columns.items():
        part = name.partition(":")[2]
        found |= {Trial(layer, part): value for layer, value in enumerate(column.values) if not math.isnan(value)}
        found |= {Trial(place, part): value for place, value in column.outside.items()}
    return found


def _positions(data: TextData, count: int | None) -> int:
    """At how many positions output is compared."""
    allowed_N = predicted(data.tokens_NT, data.mask_NT).sum(1)
    return int((allowed_N if count is None else allowed_N.clamp(max=count)).sum())


@dataclass(frozen=True)
class _Raw(Response):
    """The same trials but those whose keys are in `without`, and columns from which no floor is subtracted."""

    without: tuple[str, ...] = ()

    def trials(self, stack: Stack) -> list[Trial]:
        return [trial for trial in Response.trials(self, stack) if trial.key not in self.without]

    def finish(self, layers: int, values: Mapping[Trial, float]) -> tuple[Column, ...]:
        return Intervention.finish(self, layers, values)
