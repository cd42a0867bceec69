"""How much predictions change when one layer forgets its training: 1 - mean cosine of probability vectors.

The layer's weights are drawn anew as before training, `draws` times; 0 means that the layer could be random, values
near 1 that the decisions have nothing to do with the original's. Source: arXiv 2410.14470, there for the classes of
vision models, part by part (`measure/perturbation.py` does that for any network). Cost: layers^2 / 2 layer runs for
every draw.

Shapes: P positions, V vocabulary.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from layerwise.errors import BadOption
from layerwise.measure.base import Intervention, Needs, Trial
from layerwise.measure.ending import Ending
from layerwise.measure.scores import Column, Direction
from layerwise.nets.initial import redrawn, reset
from layerwise.stack.base import Stack
from layerwise.stack.decoder import DecoderStack


def criticality(original: Ending, changed: Ending) -> float:
    """1 - mean over positions of the cosine of the two vectors of probabilities."""
    cosines = [F.cosine_similarity(p_PV.exp(), q_PV.exp(), dim=-1).double()
               for p_PV, q_PV in zip(original.log_p(), changed.log_p(), strict=True)]
    return 1 - float(torch.cat(cosines).mean())


@dataclass(frozen=True)
class Criticality(Intervention):
    """Change of the predicted distribution with the layer's weights drawn anew, mean over `draws`.

    Predictions are compared at `tokens` positions of every row (None: all); `seed` draws the weights.
    """

    draws: int = 3
    tokens: int | None = 32
    seed: int = 0

    name: ClassVar[str] = "criticality"
    unit: ClassVar[str] = "1 - cosine"
    important: ClassVar[Direction] = "high"
    about: ClassVar[str] = "how much predictions change when the layer is as before training"
    needs: ClassVar[Needs] = "labels"

    def __post_init__(self) -> None:
        if self.draws < 1:
            raise BadOption(f"draws={self.draws} for {self.name}", expected="at least 1", do="draw weights once")

    def trials(self, stack: Stack) -> list[Trial]:
        return [Trial(layer, str(draw)) for layer in range(len(stack)) for draw in range(self.draws)]

    def alternative(self, stack: Stack, trial: Trial) -> nn.Module:
        assert isinstance(trial.place, int)
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {trial.key}".encode()))
        if not isinstance(stack, DecoderStack):
            return redrawn(stack.block(trial.place), generator)
        return reset(stack.block(trial.place), stack.spec.rows[trial.place].norm.offset, generator)

    def score(self, original: Ending, changed: Ending) -> float:
        return criticality(original, changed)

    def finish(self, layers: int, values: Mapping[Trial, float]) -> tuple[Column, ...]:
        found = ([value for trial, value in values.items() if trial.place == layer] for layer in range(layers))
        return (self.column("", (fmean(draws) if draws else math.nan for draws in found)),)
