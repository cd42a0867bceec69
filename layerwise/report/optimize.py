"""The whole job in one call: open, measure, decide, shape, verify; each step a resumable part of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from layerwise.allocate.apply import apply
from layerwise.allocate.budget import Budget
from layerwise.allocate.early import LEAST, measure_early
from layerwise.allocate.losses import Alternative
from layerwise.allocate.plan import Plan
from layerwise.allocate.solvers import SOLVERS
from layerwise.allocate.stopwatch import clock_for
from layerwise.data.text import TextData, by_frequency, text_blocks
from layerwise.errors import BadData, BadModel, BadOption
from layerwise.measure.engine import measure
from layerwise.measure.identity import identity
from layerwise.measure.response import Response
from layerwise.measure.scores import Scores
from layerwise.measure.sensitivity import stream_sensitivity
from layerwise.report.alternatives import calibrated, felt, reading, trying
from layerwise.report.decide import Decide, asked
from layerwise.report.heal import heal_in, load_healing
from layerwise.report.layers import kept_layers
from layerwise.report.refine import shortened
from layerwise.report.report import Report
from layerwise.report.run import Run
from layerwise.report.surrogates import rank_agreement, sentence
from layerwise.report.tried import SOLVER, Tried, load_tried, save_tried, try_plans
from layerwise.report.verify import verification_text, verify
from layerwise.stack.base import Stack
from layerwise.stack.decoder import DecoderStack
from layerwise.stack.open import open
from layerwise.stack.vision import VisionLanguageStack
from layerwise.train.duration import Duration
from layerwise.train.vision_language import examples

Tell = Callable[[str], None]
BLOCKS, LENGTH = 18, 512
TRIAL = 2
"""Blocks of those kept apart from what transforms read, to measure losses on."""

PICTURES = 128

SPENT = 0.9
"""Share of a budget from which it counts as used."""


@dataclass(frozen=True)
class Optimized:
    """What the job made, and where it lies."""

    plan: Plan
    scores: Scores
    tried: Sequence[Tried]
    report: Report
    model: Path
    page: Path


def optimize(
    source: str | Path,
    budget: Budget,
    run: Run,
    *,
    solver: str | None = None,
    only: Sequence[str] = (),
    data: str | Path = "default",
    seed: int = 0,
    controls: bool = False,
    heal: str | None = None,
    trials: int = TRIAL,
    tell: Tell = lambda _: None,
    progress: bool = True,
) -> Optimized:
    """Fit the model at `source` into `budget`, with everything that is produced kept in `run`.

    A plan is made, carried out and measured, and made again with predictions corrected by that, until they agree
    (see `refine`); the plan nearest to the original is taken. `solver` makes the plans, `controls` sets random,
    shuffled and reversed ones beside them. `only` limits what a layer may become (see `parse_alternatives`). `heal`
    says how long to train what came out on what the original says, such as "10m" or "200steps"; bytes stay. Text
    to measure on is the calibration split of `data`, text to verify on its verification split. Changes are tried on
    `trials` blocks of it; of more than two, parts whose absence is too bad for any plan are not tried on all
    (`allocate/early.py`). Finished steps of the run are not repeated.
    Raises BadOption for `trials` below 1, and what opening, measuring, allocating, applying and verifying raise.
    """
    if trials < 1:
        raise BadOption(f"trials={trials}", expected="a number of blocks from 1", do=f"leave it at {TRIAL}")
    duration = Duration.parse(heal) if heal else None
    stack = opened(source, tell)
    run.note("model fingerprint", identity(stack))
    decide = asked(budget, stack.spec, only, seed, clock_for(budget, stack.spec))
    calibration, trial = parted(calibration_text(stack, data, seed, BLOCKS - TRIAL + trials), trials)
    shown = calibrated(decide.alternatives, stack.spec, calibration.tokens_NT.numel(), only)
    if len(shown) < len(decide.alternatives):
        decide = replace(decide, alternatives=shown)
        decide.check(stack.spec)
    scores = run.step(
        "scores",
        lambda: measured_for(stack, calibration, trial, decide.alternatives, seed, run, tell, progress,
                             lambda scores: decide(scores, solver or SOLVER)),
        file="scores.parquet",
        save=lambda scores, path: scores.save(path),
        load=Scores.load,
    )
    tried = run.step(
        "tried",
        lambda: _try(stack, scores, solver, controls, decide, calibration, trial, tell, progress),
        file="tried.json",
        save=save_tried,
        load=load_tried,
    )
    plan = run.step(
        "plan",
        lambda: next(point.plan for point in tried if point.kind == "plan"),
        file="plan.json",
        save=lambda plan, path: plan.save(path),
        load=Plan.load,
    )
    model = run.step(
        "model",
        lambda: _shape(stack, plan, calibration, tell),
        file="model",
        save=lambda slim, path: slim.save(path),
        load=lambda path: path,
    )
    healing = None
    if duration:
        model = heal_in(run, stack, model, plan, calibration, data, duration, seed, tell)
        healing = load_healing(run.path("healing.json"))
    report = run.step(
        "report",
        lambda: replace(_verify(stack, model, plan, scores, data, seed, tell, progress), healing=healing),
        file="report.json",
        save=lambda report, path: report.save(path),
        load=Report.load,
    )
    points = [point.to_json() for point in tried]
    page = run.step(
        "page",
        lambda: report,
        file="report.html",
        save=lambda report, path: report.html(path, scores=scores, plan=plan.to_json(), tried=points),
        load=lambda path: path,
    )
    return Optimized(plan, scores, tried, report, model, page)


def calibration_text(stack: Stack, source: str | Path, seed: int, blocks: int | None = None) -> TextData:
    """Blocks to measure on, from the calibration split; for a demo that sees, questions about its own pictures.

    `blocks` is how many at the most, BLOCKS by default.

    Raises BadData for a model without a tokenizer.
    """
    if isinstance(stack, VisionLanguageStack) and source == "default":
        return examples(stack, PICTURES, seed)
    if stack.tokenizer is None:
        raise BadData(
            f"{stack.name}, which has no tokenizer",
            expected="a model folder with tokenizer files",
            do="put the tokenizer files that came with the model into its folder",
        )
    length = min(LENGTH, stack.spec.context)
    whole = text_blocks(source, stack.tokenizer, length=length, split="calibration")
    blocks = min(blocks or BLOCKS, len(whole))
    return text_blocks(source, stack.tokenizer, length=length, blocks=blocks, split="calibration", seed=seed)


def parted(text: TextData, trials: int = TRIAL) -> tuple[TextData, TextData]:
    """Blocks for statistics and `trials` to try plans on; a single block, or a demo's pictures, serve as both."""
    if len(text) < 2 or not isinstance(text, TextData):
        return text, text
    trial = min(trials, len(text) // 2)
    apart = text.skip(len(text) - trial)
    return text.take(len(text) - trial).without(apart), apart.without(apart)


def opened(source: str | Path, tell: Tell) -> DecoderStack:
    """A decoder whose weights are all finite. Raises BadModel for anything else."""
    tell(f"opening {source}")
    stack = open(source)
    if not isinstance(stack, DecoderStack):
        raise BadModel(
            f"{source}, which is no decoder language model",
            expected="a decoder of a known family",
            do="measure other modules in Python with layerwise.measure",
        )
    stack.finite()
    return stack


def measured_for(
    stack: Stack,
    calibration: TextData,
    trial: TextData,
    alternatives: Sequence[Alternative],
    seed: int,
    run: Run,
    tell: Tell,
    progress: bool,
    decide: Callable[[Scores], Plan] | None = None,
) -> Scores:
    """Everything that planning with `alternatives` needs; finished trials are kept in `run`.

    With `decide`, which makes the plan that would be chosen, parts left out may be tried on some of the text only.
    """
    journal = run.path("measured.jsonl")
    trial = shortened(trial)
    *cheap, response = trying(alternatives, by_frequency(calibration, stack.spec.vocabulary))
    assert isinstance(response, Response)
    early = decide if len(trial) > LEAST and (response.drops or response.shares) else None
    tell(f"trying changes to {len(stack)} layers on {trial.tokens_NT.numel():,} tokens")
    scores = measure(stack, trial, cheap if early else [*cheap, response], seed=seed, progress=progress, resume=journal)
    sensitivity = sensitivity_for(stack, trial, alternatives, seed, progress)
    if wanted := reading(alternatives, sensitivity):
        tell(f"reading the layers' inputs on {calibration.tokens_NT.numel():,} tokens")
        scores = scores.merge(measure(stack, calibration, wanted, seed=seed, progress=progress, resume=journal))
    if early:
        known = scores
        tried = measure_early(stack, trial, response, lambda found: early(known.merge(found)),
                              seed=seed, progress=progress, resume=journal)
        tell(f"{len(tried.provenance['stopped'])} parts left out were too bad for any plan after {LEAST} blocks")
        scores = scores.merge(tried)
    if said := sentence(scores):
        tell(said)
    return scores


def sensitivity_for(stack: Stack, trial: TextData, alternatives: Sequence[Alternative], seed: int = 0,
                    progress: bool = False) -> tuple[Tensor, ...]:
    """What predictions feel of each channel of the stream, where alternatives need that and it can be known."""
    if not isinstance(stack, DecoderStack) or not felt(alternatives) or stack.spec.packed():
        return ()
    return stream_sensitivity(stack, trial, seed=seed, progress=progress)


def _shape(stack: Stack, plan: Plan, data: TextData, tell: Tell) -> DecoderStack:
    tell("carrying out the best plan and saving the model")
    return apply(stack, plan, data)


def _try(
    stack: DecoderStack,
    scores: Scores,
    solver: str | None,
    controls: bool,
    decide: Decide,
    calibration: TextData,
    trial: TextData,
    tell: Tell,
    progress: bool,
) -> list[Tried]:
    tell("planning, and measuring what is planned")
    return try_plans(stack, scores, decide, calibration, trial, solver=solver, controls=controls, tell=tell,
                     progress=progress)


def _verify(
    stack: DecoderStack,
    model: Path,
    plan: Plan,
    scores: Scores,
    data: str | Path,
    seed: int,
    tell: Tell,
    progress: bool,
) -> Report:
    tell("verifying on text that had no part in this")
    kept = kept_layers(stack.spec, plan)
    text = verification_text(stack, data)
    report = verify(stack, open(model), text, kept=kept, seed=seed, progress=progress)
    provenance = {**report.provenance, "rank correlation of cheap scores with tried changes": rank_agreement(scores)}
    return replace(report, notes=(*report.notes, *_spare(plan)), provenance=provenance)


def _spare(plan: Plan) -> list[str]:
    """Why a plan may leave much of its budget: more would buy nothing that can be measured."""
    spent = max(plan.predicted[currency] / limit for currency, limit in plan.limits.items())
    if spent > SPENT or not SOLVERS[plan.solver].reads_losses:
        return []
    return [f"{spent:.0%} of the budget is used: more would buy nothing that can be measured"]
