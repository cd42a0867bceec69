"""The whole job in one call: open, measure, decide, shape, verify; each step a resumable part of a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from layerwise.allocate.apply import apply
from layerwise.allocate.budget import Budget
from layerwise.allocate.choices import dropped, keep, quantized
from layerwise.allocate.cost import totals
from layerwise.allocate.losses import Alternative
from layerwise.allocate.plan import Plan
from layerwise.allocate.solvers import SOLVERS
from layerwise.allocate.stopwatch import Stopwatch
from layerwise.data.text import TextData, text_blocks
from layerwise.errors import BadData, BadModel, BadOption
from layerwise.measure.base import Instrument
from layerwise.measure.engine import measure
from layerwise.measure.identity import identity
from layerwise.measure.leave_one_out import LeaveOneOut
from layerwise.measure.quantization_sensitivity import QuantizationSensitivity
from layerwise.measure.scores import Scores
from layerwise.report.decide import Decide
from layerwise.report.layers import kept_layers
from layerwise.report.report import Report
from layerwise.report.run import Run
from layerwise.report.tried import Tried, chosen, contenders, load_tried, save_tried, try_plans
from layerwise.report.verify import verification_text, verify
from layerwise.spec import BITS, StackSpec
from layerwise.stack.base import Stack
from layerwise.stack.decoder import DecoderStack
from layerwise.stack.open import open
from layerwise.stack.vision import VisionLanguageStack
from layerwise.train.vision_language import examples
from layerwise.transform.quantize import Quantize

Tell = Callable[[str], None]
BLOCKS, LENGTH = 2, 512
PICTURES = 128
POSITIONS = 128
"""Positions of every block at which the output of a changed model is compared."""

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
    tell: Tell = lambda _: None,
    progress: bool = True,
) -> Optimized:
    """Fit the model at `source` into `budget`, with everything that is produced kept in `run`.

    Several solvers plan from the same scores, every plan is carried out and measured, and the one nearest to
    the original is taken; `solver` takes that solver's plan instead. `only` limits what a layer may become
    (see `parse_alternatives`). Text to measure on is the calibration split of `data`, text to verify on its
    verification split. Finished steps of the run are not repeated.
    Raises what opening, measuring, allocating, applying and verifying raise.
    """
    stack = _opened(source, tell)
    run.note("model fingerprint", identity(stack))
    alternatives = parse_alternatives(only) or defaults_for(budget, stack.spec)
    decide = Decide(budget, alternatives, seed, Stopwatch(stack.spec) if budget.milliseconds else None)
    decide.check(stack.spec)
    calibration = calibration_text(stack, data, seed)
    scores = run.step(
        "scores",
        lambda: _measure(stack, calibration, alternatives, seed, run, tell, progress),
        file="scores.parquet",
        save=lambda scores, path: scores.save(path),
        load=Scores.load,
    )
    tried = run.step(
        "tried",
        lambda: _try(stack, scores, solver, decide, calibration, tell, progress),
        file="tried.json",
        save=save_tried,
        load=load_tried,
    )
    plan = run.step(
        "plan",
        lambda: decide(scores, next(point.name for point in tried if point.kind == "plan")),
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
    report = run.step(
        "report",
        lambda: _verify(stack, model, plan, data, seed, tell, progress),
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


def parse_alternatives(only: Sequence[str]) -> list[Alternative]:
    """What a layer may become, from words: a width (`8`), `drop`, `drop-attention`, `drop-feed-forward`.

    Leaving a layer as it is is always possible. Raises BadOption for another word.
    """
    words: dict[str, Callable[[], Alternative]] = {
        "drop": dropped,
        "drop-attention": lambda: dropped("attention"),
        "drop-feed-forward": lambda: dropped("feed_forward"),
    }
    found = [keep()] if only else []
    for word in only:
        if word in words:
            found.append(words[word]())
        elif word.isdigit() and int(word) in BITS:
            found.append(quantized(int(word)))
        else:
            legal = [*map(str, BITS), *words]
            raise BadOption(f"--only {word}", expected=f"one of: {', '.join(legal)}", do="correct the word")
    return found


def defaults_for(budget: Budget, spec: StackSpec) -> list[Alternative]:
    """Alternatives that can help with this budget: widths to save bytes, dropping to have fewer layers."""
    limited = set(budget.given())
    widths = useful_widths(budget, spec) if limited & {"bytes", "bits", "milliseconds"} else ()
    drops = [dropped()] if limited & {"layers", "parameters", "milliseconds"} else []
    return [keep(), *map(quantized, widths), *drops]


def useful_widths(budget: Budget, spec: StackSpec) -> tuple[int, ...]:
    """The widths worth measuring: from the widest down to the third that fits everywhere.

    5 bits are passed over, as they run at the speed of 6. Widths well below the budget belong to it, because a
    layer that bears them pays for others that do not.
    """
    widths = sorted(set(BITS) - {5}, reverse=True)
    limits = budget.limits({**totals(spec), "milliseconds": math.inf})
    allowed = min(limits.get("bytes", math.inf), limits.get("bits", math.inf) * spec.parameters() / 8)
    if allowed == math.inf:
        return tuple(widths)
    fits = next((place for place, bits in enumerate(widths) if _size_at(bits, spec) <= allowed), len(widths))
    return tuple(widths[: fits + 3])


def _size_at(bits: int, spec: StackSpec) -> int:
    """Stored bytes with every matrix and table at `bits`."""
    transform = Quantize(bits)
    packed = replace(spec, rows=tuple(transform.edit(row, spec.hidden) for row in spec.rows))
    head = None if spec.tied else transform.format
    return replace(packed, embedding_format=transform.format, head_format=head).bytes()


def calibration_text(stack: Stack, source: str | Path, seed: int) -> TextData:
    """Blocks to measure on, from the calibration split; for a demo that sees, questions about its own pictures.

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
    return text_blocks(source, stack.tokenizer, length=length, blocks=BLOCKS, split="calibration", seed=seed)


def instruments_for(alternatives: Sequence[Alternative]) -> list[str | Instrument]:
    """What must be measured to plan with `alternatives`, and what a reader wants to see beside it."""
    widths = tuple(edit.arguments["bits"] for edit in alternatives if edit.transform == "quantize")
    chosen: list[str | Instrument] = ["block-influence", "logit-lens-kl"]
    if widths:
        chosen.append(QuantizationSensitivity(bits=widths, tokens=POSITIONS))
    if any(edit.transform == "drop" for edit in alternatives):
        chosen.append(LeaveOneOut(tokens=POSITIONS))
    return chosen


def _opened(source: str | Path, tell: Tell) -> DecoderStack:
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


def _measure(
    stack: Stack,
    data: TextData,
    alternatives: Sequence[Alternative],
    seed: int,
    run: Run,
    tell: Tell,
    progress: bool,
) -> Scores:
    tell(f"measuring {len(stack)} layers on {data.tokens_NT.numel():,} tokens")
    instruments = instruments_for(alternatives)
    journal = run.path("measured.jsonl")
    return measure(stack, data, instruments, seed=seed, progress=progress, resume=journal)


def _shape(stack: Stack, plan: Plan, data: TextData, tell: Tell) -> DecoderStack:
    tell("carrying out the best plan and saving the model")
    return apply(stack, plan, data)


def _try(
    stack: Stack,
    scores: Scores,
    solver: str | None,
    decide: Decide,
    data: TextData,
    tell: Tell,
    progress: bool,
) -> list[Tried]:
    plans = list(contenders(scores, decide, solver))
    tell(f"carrying out and measuring {len(plans)} plans")
    return chosen(try_plans(stack, plans, data, progress=progress), solver)


def _verify(
    stack: DecoderStack, model: Path, plan: Plan, data: str | Path, seed: int, tell: Tell, progress: bool
) -> Report:
    tell("verifying on text that had no part in this")
    kept = kept_layers(stack.spec, plan)
    text = verification_text(stack, data)
    report = verify(stack, open(model), text, kept=kept, seed=seed, progress=progress)
    return replace(report, notes=(*report.notes, *_spare(plan)))


def _spare(plan: Plan) -> list[str]:
    """Why a plan may leave much of its budget: more would buy nothing that can be measured."""
    spent = max(plan.predicted[currency] / limit for currency, limit in plan.limits.items())
    if spent > SPENT or not SOLVERS[plan.solver].reads_losses:
        return []
    return [f"{spent:.0%} of the budget is used: what more would buy differs by no more than rounding does"]
