"""Where information moves between groups of positions: cutting, swapping and freezing along one walk.

A trace keeps the states of one forward pass at every depth. Each question to it starts from the depth at
which something is changed, runs the rest, and gives the prediction after the last token:

    cut       target positions do not see source positions in some layers (arXiv 2411.18620)
    swapped   at one depth, some positions hold the states of another run (arXiv 2412.14133)
    frozen    between two depths, some positions keep the state they have at the first

Shapes: B rows, T tokens, V vocabulary, C hidden width, L layers.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from layerwise.errors import BadOption
from layerwise.measure.track import read
from layerwise.stack.base import Stack, State
from layerwise.stack.knockout import knockout


class Trace:
    """One forward pass of `stack(tokens_BT, **inputs)` kept at every depth, the embedding first.

    `places_B` are the positions that predict, by default the last ones. Predictions are log-probabilities
    [B, V]. Memory: a hidden state for every layer.
    """

    def __init__(self, stack: Stack, tokens_BT: Tensor, places_B: Tensor | None = None, **inputs: Any) -> None:
        self.stack = stack
        self.places_B = torch.full((len(tokens_BT),), tokens_BT.shape[1] - 1) if places_B is None else places_B
        with torch.inference_mode():
            self.states = [stack.start(tokens_BT, **inputs)]
            for layer in range(len(stack)):
                self.states.append(stack.run(self.states[-1], slice(layer, layer + 1)))

    def prediction(self, depth: int | None = None) -> Tensor:
        """The model's own prediction; at a smaller `depth` what the lens reads there."""
        return self._read(self.states[-1 if depth is None else depth])

    def cut(self, source_BT: Tensor, target_BT: Tensor, layers: range) -> Tensor:
        """The prediction with attention from `target_BT` to `source_BT` cut in `layers` (see `knockout`)."""
        if not layers:
            return self.prediction()
        with knockout(self.stack, source_BT, target_BT, layers):
            return self._finish(self.states[layers.start])

    def swapped(self, other: Trace, places_BT: Tensor, depth: int) -> Tensor:
        """The prediction when `places_BT` enter layer `depth` with the states of `other`.

        Raises BadOption for traces of different shape.
        """
        mine, theirs = self.states[depth], other.states[depth]
        if mine.hidden.shape != theirs.hidden.shape:
            raise BadOption(
                f"runs of shapes {tuple(mine.hidden.shape)} and {tuple(theirs.hidden.shape)}",
                expected="prompts of one length",
                do="use the same prompt with another picture or name",
            )
        return self._finish(_replaced(mine, theirs.hidden, places_BT))

    def frozen(self, places_BT: Tensor, start: int, stop: int) -> Tensor:
        """The prediction when `places_BT` enter every layer from `start` to `stop` as they enter `start`."""
        held_BTC, state = self.states[start].hidden, self.states[start]
        with torch.inference_mode():
            for layer in range(start, stop):
                state = _replaced(self.stack.run(state, slice(layer, layer + 1)), held_BTC, places_BT)
        return self._finish(state)

    def _finish(self, state: State) -> Tensor:
        with torch.inference_mode():
            return self._read(self.stack.run(state))

    def _read(self, state: State) -> Tensor:
        with torch.inference_mode():
            return read(self.stack, state, self.places_B)


def window(centre: int, width: int, layers: int) -> range:
    """About `width` layers around `centre`, cut off at both ends, as published: from centre - width // 2."""
    return range(max(0, centre - width // 2), min(layers, centre + math.ceil(width / 2)))


def change(before_B: Tensor, after_B: Tensor) -> Tensor:
    """Relative change of a probability in percent, both given as log-probabilities."""
    return 100 * torch.expm1(after_B.double() - before_B.double())


def _replaced(state: State, hidden_BTC: Tensor, places_BT: Tensor) -> State:
    places_BT1 = places_BT.to(state.hidden.device)[..., None]
    return state.moved(torch.where(places_BT1, hidden_BTC, state.hidden), state.layer)
