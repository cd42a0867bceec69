"""`measure`: run instruments on a model, sharing everything that can be shared."""

from __future__ import annotations

import math
import platform
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.errors import BadData, BadModel, BadOption, LayerwiseError
from layerwise.measure import INSTRUMENTS, backward, reading, sweep
from layerwise.measure.base import (
    Call,
    Forward,
    Gradient,
    Instrument,
    Intervention,
    PerLayer,
    Reading,
    StateGradient,
    Walk,
    WeightGradient,
)
from layerwise.measure.forward import Pass, forward_pass
from layerwise.measure.identity import identity
from layerwise.measure.inputs import Input, Inputs, fingerprint, try_batch
from layerwise.measure.journal import Journal
from layerwise.measure.memory import enough_memory
from layerwise.measure.module_walk import check_classes, check_labels
from layerwise.measure.progress import Progress
from layerwise.measure.scores import Column, Scores
from layerwise.stack.base import Stack, first_tensor
from layerwise.stack.decoder import DecoderStack

VERSION = 1
"""Raised when a change makes finished trials in old journals wrong."""


@torch.inference_mode(False)
@torch.no_grad()
def measure(stack: Stack, data: Any, instruments: str | Instrument | Iterable[str | Instrument], *,
            seed: int = 0, batch: int | None = None, lens_tokens: int | None = None, progress: bool = True,
            resume: str | Path | None = None) -> Scores:
    """Measure every layer of `stack` on `data`.

    `data` is a TextData, a tensor of token ids [N, T], or batches (for modules whatever their forward pass
    takes); None where no instrument needs data. `instruments` are names in `INSTRUMENTS`, or instances where
    parameters differ from the defaults.

    `seed` draws the positions at which output is compared. `batch` is the number of rows that run at once.
    `lens_tokens` positions of every row are read through the lens; None means one in 32, which keeps all
    forward instruments together within 1.5 forward passes. With `resume`, finished trials of interventions
    are appended to that file and taken from it when the same measurement starts again.

    Raises UnknownName for an instrument that does not exist, BadOption for one that this model cannot have,
    BadData for data that is missing, empty or not the model's, BadModel for activations that are not finite,
    naming the layer and the first batch, BadOption where memory runs out, saying what to leave out.
    """
    chosen = resolve(instruments)
    inputs = None if data is None else Inputs(stack, data, batch)
    check(stack, inputs, chosen)
    model = identity(stack)
    sample, tokens = ("", 0) if inputs is None else fingerprint(inputs)
    origin = [VERSION, model, sample, seed, None if inputs is None else inputs.size]
    journals = {instrument: Journal(Path(resume) if resume else None, [*origin, instrument.to_json()])
                for instrument in chosen if isinstance(instrument, (Intervention, Reading))}
    job = _Job(stack, inputs, chosen, seed, lens_tokens, journals)
    with Progress("measuring", job.steps(), progress) as bar:
        made = job.run(bar)
    columns = {column.name: column for instrument in chosen for column in made[instrument]}
    return Scores(stack.spec, columns, model, {
        "data": None if inputs is None else inputs.name, "sample": sample, "tokens": tokens, "seed": seed,
        "lens_tokens": lens_tokens, "instruments": [instrument.to_json() for instrument in chosen],
        "torch": torch.__version__, "machine": platform.machine(), "threads": torch.get_num_threads(),
    })


def resolve(instruments: str | Instrument | Iterable[str | Instrument]) -> list[Instrument]:
    """Names and instances as instances. BadOption for none, or for two that make one column."""
    given = [instruments] if isinstance(instruments, (str, Instrument)) else list(instruments)
    chosen: list[Instrument] = [INSTRUMENTS[item]() if isinstance(item, str) else item for item in given]
    made = Counter(name for instrument in chosen for name in instrument.columns())
    twice = [name for name, times in made.items() if times > 1]
    if twice or not chosen:
        raise BadOption(f"instruments {[instrument.name for instrument in chosen]}",
                        expected="at least one, each making its own columns",
                        do=f"leave out one that makes {twice[0]!r}" if twice
                        else f"name some of {list(INSTRUMENTS)}")
    return chosen


def supported(stack: Stack, names: Iterable[str], data: Any = None) -> list[str]:
    """Those of the instruments that this model can have; with `data`, only those for which it has labels."""
    return [name for name in names if lacking(stack, name, data) is None]


def lacking(stack: Stack, name: str, data: Any = None) -> LayerwiseError | None:
    """Why this model cannot have an instrument, with `data` also what that lacks for it; None where it can."""
    try:
        _check_model(stack, [INSTRUMENTS[name]()])
        if data is not None:
            _check_data(stack, Inputs(stack, data), [INSTRUMENTS[name]()])
    except (BadOption, BadData, BadModel) as error:
        return error
    return None


def names(kind: type[Instrument]) -> list[str]:
    """The registered instruments of one kind, such as all that share the forward pass."""
    return [name for name in INSTRUMENTS if issubclass(INSTRUMENTS[name], kind)]


@dataclass
class _Job:
    stack: Stack
    inputs: Inputs | None
    chosen: Sequence[Instrument]
    seed: int
    lens_tokens: int | None
    journals: dict[Intervention | Reading, Journal]

    def __post_init__(self) -> None:
        self.forward: list[Forward[Any]] = [i for i in self.chosen if isinstance(i, Forward)]
        self.per_layer = [i for i in self.chosen if isinstance(i, PerLayer)]
        self.gradient = [i for i in self.chosen if isinstance(i, WeightGradient)]
        self.attribution = [i for i in self.chosen if isinstance(i, StateGradient)]
        self.walking = [i for i in self.chosen if isinstance(i, Walk)]
        self.reading = [i for i in self.chosen if isinstance(i, Reading)]
        self.trying = [i for i in self.chosen if isinstance(i, Intervention)]

    def steps(self) -> int:
        """Layer runs of everything, for the progress bar."""
        batches = 1 if self.inputs is None else len(self.inputs)
        runs = bool(self.forward) + 3 * bool(self.gradient) + 3 * bool(self.attribution) + 2 * len(self.walking)
        once = len(self.stack) * (bool(self.reading) + bool(self.per_layer))
        return batches * len(self.stack) * runs + once + sweep.cost(self.stack, self.trying)

    def run(self, bar: Progress) -> dict[Instrument, tuple[Column, ...]]:
        made = self._layers(bar)
        if self.inputs is not None:
            if self.gradient:
                with enough_memory(self.stack, "taking gradients", _named(self.gradient)):
                    columns = backward.backward_pass(self.stack, self.inputs, self.gradient, bar)
                made |= dict(zip(self.gradient, columns, strict=True))
            if self.attribution:
                with enough_memory(self.stack, "taking gradients", _named(self.attribution)):
                    tallies = backward.state_pass(self.stack, self.inputs, self.attribution, bar)
                made |= {i: i.finish(tally) for i, tally in zip(self.attribution, tallies, strict=True)}
            if self.reading:
                journals = [self.journals[instrument] for instrument in self.reading]
                with enough_memory(self.stack, "reading matrices", _named(self.reading)):
                    columns = reading.read(self.stack, self.inputs, self.reading, journals, bar)
                made |= dict(zip(self.reading, columns, strict=True))
            for walking in self.walking:
                made[walking] = self._walked(walking, self.inputs, bar)
            if self.trying:
                made |= dict(zip(self.trying, self._tried(self.inputs, bar), strict=True))
        return made

    def _tried(self, inputs: Inputs, bar: Progress) -> list[tuple[Column, ...]]:
        journals = [self.journals[instrument] for instrument in self.trying]
        with enough_memory(self.stack, "trying alternatives", _named(self.trying)), self._located(inputs, bar):
            return sweep.sweep(self.stack, inputs, self.trying, journals, seed=self.seed, progress=bar)

    def _walked(self, instrument: Walk, inputs: Inputs, bar: Progress) -> tuple[Column, ...]:
        with enough_memory(self.stack, "walking the layers", repr(instrument.name)), self._located(inputs, bar):
            return instrument.walk(self.stack, inputs, self.seed, bar)

    @contextmanager
    def _located(self, inputs: Inputs, bar: Progress) -> Iterator[None]:
        """Where the model's output is found broken, another pass says in which layer it breaks."""
        try:
            yield
        except BadModel:
            forward_pass(inputs, Pass(self.stack, [], [], bar))
            raise

    def _layers(self, bar: Progress) -> dict[Instrument, tuple[Column, ...]]:
        """The forward pass, and what reads one layer at a time, in one reading of a streamed model."""
        values: list[list[Mapping[str, float]]] = [[] for _ in self.per_layer]
        calls = _calls(self.stack, self.inputs)

        def read(layer: int) -> None:
            for value, instrument in zip(values, self.per_layer, strict=True):
                with enough_memory(self.stack, f"{instrument.name!r} reads layer {layer}", repr(instrument.name)):
                    value.append(instrument.of(self.stack, layer, calls.get(layer)))
            bar.step(bool(self.per_layer))

        tallies = [instrument.start(self.stack.spec) for instrument in self.forward]
        together = isinstance(self.stack, DecoderStack) and self.stack.streamed and bool(self.forward)
        if not together:
            for layer in range(len(self.stack)):
                read(layer)
        if self.forward and self.inputs is not None:
            wanted = Pass(self.stack, self.forward, tallies, bar, self.seed, self.lens_tokens)
            forward_pass(self.inputs, wanted, read if together else None)
        made: dict[Instrument, tuple[Column, ...]] = {
            instrument: instrument.finish(tally)
            for instrument, tally in zip(self.forward, tallies, strict=True)}
        for instrument, value in zip(self.per_layer, values, strict=True):
            made[instrument] = tuple(instrument.column(part, (found.get(part, math.nan) for found in value))
                                     for part in instrument.parts if any(part in found for found in value))
        return made


def _named(instruments: Sequence[Instrument]) -> str:
    return " or ".join(repr(instrument.name) for instrument in instruments)


def check(stack: Stack, inputs: Inputs | None, chosen: Sequence[Instrument]) -> None:
    """Say what this model or data lacks before anything runs."""
    needing = [instrument for instrument in chosen if not isinstance(instrument, PerLayer)]
    if needing and inputs is None:
        raise BadData(f"no data for the instrument {needing[0].name!r}",
                      expected="text, or batches of the model's input",
                      do="pass data, for example layerwise.data.text.text_blocks('default', stack.tokenizer)")
    _check_model(stack, chosen)
    if inputs is not None:
        _check_data(stack, inputs, chosen)


def _check_data(stack: Stack, inputs: Inputs, chosen: Sequence[Instrument]) -> None:
    """Raise BadData where labels are needed and the data of a module has none, or a walk cannot use the data."""
    for instrument in chosen:
        if isinstance(instrument, Walk):
            instrument.check(inputs)
    if not isinstance(stack, DecoderStack):
        wanting = [i for i in chosen if isinstance(i, (Gradient, Intervention)) and i.needs == "labels"]
        if wanting:
            what = f"the instrument {wanting[0].name!r} on {stack.name}"
            check_labels(inputs, what)
            _check_output(stack, next(iter(inputs)), what)


def _check_output(stack: Stack, first: Input, what: str) -> None:
    """Raise BadModel where what the module says of the first batch is no logits of its classes."""
    assert first.labels_B is not None
    try:
        with torch.inference_mode():
            logits = first_tensor(stack(*first.args, **first.kwargs))
    except Exception:  # said better where the pass over all data begins
        return
    check_classes(logits, first.labels_B, what)


def _check_model(stack: Stack, chosen: Sequence[Instrument]) -> None:
    if isinstance(stack, DecoderStack):
        return
    for instrument in chosen:
        if isinstance(instrument, PerLayer):
            continue
        if isinstance(instrument, (Gradient, Intervention)) and instrument.needs != "tokens":
            continue
        if not isinstance(instrument, Forward) or "lens" in instrument.sites:
            lens = isinstance(instrument, (Forward, Walk))
            lacking = "the site 'lens'" if lens else "the loss of the next token"
            raise BadOption(f"the instrument {instrument.name!r}, which needs {lacking}, on {stack.name}",
                            expected="a decoder language model",
                            do="measure what needs only 'input' and 'output', such as 'block-influence'")
        _check_halves(stack, instrument)


def _check_halves(stack: Stack, instrument: Forward[Any]) -> None:
    for site in sorted(instrument.sites & {"attention", "feed_forward"}):
        for layer in range(len(stack)):
            try:
                stack.module(layer, site)  # type: ignore[arg-type]
            except BadOption as error:
                raise BadOption(f"the instrument {instrument.name!r}, which needs the site {site!r}, on "
                                f"{stack.name}: {error.given}", expected=error.expected,
                                do="measure what needs only 'input' and 'output'") from error


def _calls(stack: Stack, inputs: Inputs | None) -> dict[int, Call]:
    """How a module calls each of its layers on the first batch; nothing for a decoder or without data.

    Raises BadData where the module cannot run on that batch.
    """
    if inputs is None or isinstance(stack, DecoderStack):
        return {}
    calls: dict[int, Call] = {}

    def watch(layer: int, block: nn.Module) -> Any:
        def look(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden: Tensor = first_tensor((*args, *kwargs.values()))
            calls[layer] = Call(lambda: block(*args, **kwargs), hidden)
        return block.register_forward_pre_hook(look, with_kwargs=True)

    with ExitStack() as hooks:
        for layer in range(len(stack)):
            hooks.callback(watch(layer, stack.block(layer)).remove)
        first = next(iter(inputs))
        with enough_memory(stack, "running the first batch"):
            try_batch(stack, first)
    return calls
