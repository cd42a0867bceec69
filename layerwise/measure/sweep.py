"""Trying alternatives layer by layer along one walk: what comes before a changed layer is computed once.

The states of all batches stand at the layer in question; a trial runs them from there to the end and leaves
them where they are, then they move one layer on. Trying every layer so costs half of what starting over
would. Finished trials go to a journal, so that a killed sweep continues.

Shapes: B rows, T tokens, C hidden width, P sampled positions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from layerwise.errors import BadData, BadModel
from layerwise.measure.base import Intervention, Trial
from layerwise.measure.ending import Ending
from layerwise.measure.inputs import Inputs
from layerwise.measure.journal import Journal
from layerwise.measure.module_walk import ModuleWalk, check_classes
from layerwise.measure.progress import Progress
from layerwise.measure.sample import predicted, sample
from layerwise.measure.scores import Column
from layerwise.stack.base import Stack, State
from layerwise.stack.decoder import DecoderStack


def sweep(stack: Stack, inputs: Inputs, instruments: Sequence[Intervention], journals: Sequence[Journal], *,
          seed: int, progress: Progress) -> list[tuple[Column, ...]]:
    """The columns of every instrument. BadData for texts of one token, BadModel for a broken original.

    A layer of a module that cannot be left out, because the shape would change, is not a number.
    """
    plans = [instrument.trials(stack) for instrument in instruments]
    if any(trial.key not in journal for plan, journal in zip(plans, journals, strict=True) for trial in plan):
        walk = _walk(stack, inputs, instruments, seed)
        for place in [*range(len(stack)), *_outside(plans)]:
            for index, (instrument, journal) in enumerate(zip(instruments, journals, strict=True)):
                for trial in plans[index]:
                    if trial.place == place and trial.key not in journal:
                        alternative = instrument.alternative(stack, trial)
                        if isinstance(walk, ModuleWalk):
                            assert isinstance(alternative, nn.Module)
                            original, changed = walk.original, walk.ending(alternative)
                        else:
                            original, changed = walk.originals[index], walk.ending(index, alternative, place)
                        if changed is not None:
                            score = instrument.score(original, changed)
                            journal[trial.key] = math.inf if math.isnan(score) else score
                        progress.step(len(stack) - place if isinstance(place, int) else len(stack))
            if isinstance(place, int):
                walk.advance()
    return [instrument.finish(len(stack), {trial: journal[trial.key] for trial in plan if trial.key in journal})
            for instrument, plan, journal in zip(instruments, plans, journals, strict=True)]


def _walk(stack: Stack, inputs: Inputs, instruments: Sequence[Intervention], seed: int) -> Walk | ModuleWalk:
    if isinstance(stack, DecoderStack):
        sources = frozenset[int]().union(*(instrument.sources(stack) for instrument in instruments))
        return Walk(stack, inputs, [instrument.tokens for instrument in instruments], seed, sources)
    walk = ModuleWalk(stack, inputs)
    for instrument in instruments:
        if instrument.needs == "labels":
            check_classes(walk.original.hidden_PC, walk.labels_P, repr(instrument.name))
    return walk


def cost(stack: Stack, instruments: Sequence[Intervention]) -> int:
    """Layer runs of a whole sweep."""
    places = [trial.place for instrument in instruments for trial in instrument.trials(stack)]
    return sum(len(stack) - place if isinstance(place, int) else len(stack) for place in places)


def _outside(plans: Sequence[Sequence[Trial]]) -> list[str]:
    return sorted({trial.place for plan in plans for trial in plan if isinstance(trial.place, str)})


class Walk:
    """The states of all batches at one layer, and the original's end for each of several sample sizes.

    Blocks in the place of others may read the keys and values of earlier layers that are among the `sources`.
    """

    def __init__(self, stack: Stack, inputs: Inputs, counts: Sequence[int | None], seed: int,
                 sources: frozenset[int] = frozenset()) -> None:
        self.stack, self.items = stack, list(inputs)
        self.states = [item.start(stack) for item in self.items]
        for state in self.states if sources else ():
            state.shared.sources |= sources
        self.samples = [self._sample(count, seed) for count in counts]
        targets = [item.tokens_BT.flatten().roll(-1) for item in self.items if item.tokens_BT is not None]
        self.targets = [torch.cat([next_N[place_P] for next_N, place_P in zip(targets, places, strict=True)])
                        for places in self.samples]
        finals = self._finals(stack, self.states)
        originals = {count: replace(self._ending(counts.index(count), stack, finals), stays=True) for count in counts}
        self.originals = [originals[count] for count in counts]
        if any(not math.isfinite(original.loss) for original in self.originals):
            raise BadModel(f"the loss of {stack.name} is not finite", expected="a model that predicts",
                           do="check its weights, or compute in float32: open(..., dtype='float32')")

    def advance(self) -> None:
        """Move all states past the layer they stand at."""
        layer = self.states[0].layer
        self.states = [self.stack.run(state, slice(layer, layer + 1)) for state in self.states]

    def ending(self, index: int, alternative: nn.Module | Stack, place: int | str) -> Ending:
        """The end with a block in place of the layer the states stand at, or of a whole changed stack."""
        if isinstance(alternative, Stack):
            states = [item.start(alternative) for item in self.items]
            return self._ending(index, alternative, self._finals(alternative, states))
        assert place == self.states[0].layer
        with self.stack.swap(self.states[0].layer, alternative):
            return self._ending(index, self.stack, self._finals(self.stack, self.states))

    def _finals(self, stack: Stack, states: list[State]) -> list[Tensor]:
        """Last hidden states [B, T, C] of every batch; layer by layer, so a streamed layer is read once."""
        for layer in range(states[0].layer, len(stack)):
            states = [stack.run(state, slice(layer, layer + 1)) for state in states]
        return [state.hidden for state in states]

    def _ending(self, index: int, stack: Stack, finals: list[Tensor]) -> Ending:
        hidden_PC = torch.cat([final_BTC.flatten(0, 1)[place_P.to(final_BTC.device)]
                               for final_BTC, place_P in zip(finals, self.samples[index], strict=True)])
        state = self.states[0]

        def head(rows_PC: Tensor) -> Tensor:
            logits_1PV: Tensor = stack.finish(state.moved(rows_PC[None], len(stack)))
            return logits_1PV[0]

        return Ending(hidden_PC, self.targets[index].to(hidden_PC.device), head, stack.spec.vocabulary)

    def _sample(self, count: int | None, seed: int) -> list[Tensor]:
        places = [sample(item.tokens_BT, predicted(item.tokens_BT, item.mask_BT), lambda n: count or n, seed)
                  for item in self.items if item.tokens_BT is not None]
        if not sum(place_P.numel() for place_P in places):
            raise BadData("texts of one token", expected="at least two tokens in a row",
                          do="give longer texts")
        return places
